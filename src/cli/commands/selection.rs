//! VMs as the command line names them, found in the configuration.

use crate::cli::args::VmSelector;
use crate::cli::exit::{Exit, Failure};
use crate::cli::site::Unopened;
use crate::config::{Config, Customer, Vm};
use crate::model::CustomerName;

/// The one VM that is meant.
pub fn configured<'a>(
    config: &'a Config,
    selector: &VmSelector,
) -> Result<(&'a Customer, &'a Vm), Failure> {
    let mut found = config.customers.iter().flat_map(|customer| {
        customer
            .vms
            .iter()
            .filter(|vm| selector.matches(&customer.name, &vm.name))
            .map(move |vm| (customer, vm))
    });
    match (found.next(), found.next()) {
        (Some(one), None) => Ok(one),
        (Some((first, _)), Some((second, _))) => Err(ambiguous(
            selector,
            &[first.name.as_str(), second.name.as_str()],
        )),
        (None, _) => Err(Failure::new(
            Exit::Usage,
            format!("no VM {selector} in {}", config.file.display()),
        )
        .hint("vmkeep config show lists the VMs")),
    }
}

/// These customers, or all where none is named.
pub fn customers<'a>(
    config: &'a Config,
    names: &[CustomerName],
) -> Result<Vec<&'a Customer>, Failure> {
    for name in names {
        if !config.customers.iter().any(|one| one.name == *name) {
            let message = format!("customer {name} is not in the configuration of this host");
            return Err(
                Failure::new(Exit::Usage, message).hint("vmkeep config show lists the customers")
            );
        }
    }
    let mut customers: Vec<&Customer> = config.customers.iter().collect();
    customers.retain(|one| names.is_empty() || names.contains(&one.name));
    Ok(customers)
}

/// A note on each customer that was not looked through for what another one has.
pub fn passed_over(unopened: &[Unopened<'_>]) -> Vec<String> {
    let note = |(customer, failure): &Unopened<'_>| {
        format!("{customer} was not looked through: {}", failure.message)
    };
    unopened.iter().map(note).collect()
}

pub fn ambiguous(selector: &VmSelector, customers: &[&str]) -> Failure {
    Failure::new(
        Exit::Usage,
        format!(
            "{selector} is not one VM: customers {} have one of this name",
            customers.join(" and ")
        ),
    )
    .hint(format!(
        "say which: {}",
        customers
            .iter()
            .map(|customer| format!("{customer}/{}", selector.vm))
            .collect::<Vec<_>>()
            .join(" or ")
    ))
}

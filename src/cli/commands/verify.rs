use super::report::{verified_document, verified_text};
use super::tally::Tally;
use crate::cli::answer::Answer;
use crate::cli::args::VerifyArgs;
use crate::cli::exit::{Exit, Failure};
use crate::cli::invocation::Invocation;
use crate::cli::site::{Ground, Site, Watching};
use crate::config::{Config, Customer};
use crate::jobs::{Verified, VerifyRequest, verify, verify_sealed};
use serde_json::json;

pub fn run(invocation: &Invocation, args: &VerifyArgs) -> Result<Answer, Failure> {
    if args.without_keys {
        let mut ground = Ground::open(invocation)?;
        ground.store.read_no_copies();
        let threads = ground.config.host.threads;
        return each(invocation, &ground.config, |config| {
            let customer = ground.sealed(&config.name)?;
            let watching = Watching::new(invocation);
            let stop = &invocation.stop;
            Ok(verify_sealed(
                &customer,
                args.read_data,
                threads,
                &watching,
                stop,
            )?)
        });
    }
    let mut site = Site::open(invocation)?;
    // The store is what is verified, not this host's copies of it.
    site.store.read_no_copies();
    let request = VerifyRequest {
        trees: true,
        read_percent: args.read_data,
        unread_since: None,
        threads: site.config.host.threads,
    };
    each(invocation, &site.config, |config| {
        let open = site.customer(config)?;
        let watching = Watching::new(invocation);
        Ok(verify(
            &open.customer,
            request,
            &watching,
            &invocation.stop,
        )?)
    })
}

fn each(
    invocation: &Invocation,
    config: &Config,
    check: impl Fn(&Customer) -> Result<Verified, Failure>,
) -> Result<Answer, Failure> {
    let mut tally = Tally::default();
    let mut damage = 0;
    for customer in &config.customers {
        match check(customer) {
            Ok(verified) => {
                damage += verified.damage.len();
                let text = verified_text(&customer.name, &verified);
                tally.add(&text, verified_document(&customer.name, &verified), None);
            }
            Err(failure) => tally.failed(invocation, &customer.name, failure)?,
        }
    }
    if damage > 0 {
        tally.text.push_str(
            "What is damaged is named above; everything else restores. A full backup of the VMs\n\
             (vmkeep backup --full VM) stores anew what their disks still hold, which heals the\n\
             restore points that need it.\n",
        );
        tally.meet(Some(Failure::new(Exit::DamageFound, "damage")));
    }
    let sound = tally.worst.is_none();
    Ok(tally.answer(|customers| json!({ "sound": sound, "customers": customers })))
}

use super::report::{verified_document, verified_text};
use super::tally::Tally;
use crate::cli::answer::Answer;
use crate::cli::args::VerifyArgs;
use crate::cli::exit::{Exit, Failure};
use crate::cli::invocation::Invocation;
use crate::cli::site::{Ground, Site, Watching};
use crate::config::{Config, Customer};
use crate::jobs::{AlarmKind, Verified, VerifyRequest, verify, verify_sealed};
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
        let verified = verify(&open.customer, request, &watching, &invocation.stop)?;
        if args.read_data == Some(100)
            && verified.damage.is_empty()
            && verified.incomplete().is_none()
        {
            let over = [AlarmKind::Damage, AlarmKind::VerificationFailed];
            site.settle_alarms(&config.name, &over);
        }
        Ok(verified)
    })
}

fn each(
    invocation: &Invocation,
    config: &Config,
    check: impl Fn(&Customer) -> Result<Verified, Failure>,
) -> Result<Answer, Failure> {
    let mut tally = Tally::default();
    let (mut damage, mut certificates, mut unread) = (0, 0, 0);
    for customer in &config.customers {
        match check(customer) {
            Ok(mut verified) => {
                damage += verified.damage.len();
                certificates += verified.certificates.len();
                // For who asks for all of it the evidence is a part.
                verified.damage.append(&mut verified.certificates);
                unread += verified.unread.len();
                let text = verified_text(&customer.name, &verified);
                let failure = verified.incomplete().map(Failure::from);
                if let Some(failure) = &failure {
                    invocation.terminal.tell(failure);
                }
                let document = verified_document(&customer.name, &verified);
                tally.add(&text, document, failure);
            }
            Err(failure) => tally.failed(invocation, &customer.name, failure)?,
        }
    }
    if unread > 0 {
        tally.text.push_str(
            "What could not be read may be whole: look at the disk and its cables, then run\n\
             this again. A pack that stays so is best moved away: vmkeep verify --read-data\n\
             then notes that it is missing, which the next full backup heals.\n",
        );
    }
    if damage > 0 {
        tally.text.push_str(
            "What is damaged is named above, with a restore point that needs it where one is\n\
             known; others may need it too. A full backup (vmkeep backup --full VM) stores\n\
             anew what the disks still hold, which heals all restore points that need it.\n",
        );
    }
    if damage + certificates > 0 {
        tally.meet(Some(Failure::new(Exit::DamageFound, "damage")));
    }
    let sound = tally.worst.is_none();
    Ok(tally.answer(|customers| json!({ "sound": sound, "customers": customers })))
}

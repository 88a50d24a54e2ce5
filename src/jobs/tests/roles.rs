//! What a host may do, who lets it in, and what it leaves to others.

use crate::codec::age::AgeRecipient;
use crate::format::entry::{Body, HostBody, Role};
use crate::jobs::testing::{Lab, back_up};
use crate::jobs::{
    Admission, Admitted, AlarmKind, JobErrorKind, LocalHost, Looked, Policies, admit, admit_host,
    alarms, apply_policy, begin_run,
};
use crate::policy::PolicyTerms;
use crate::repository::Customer;
use crate::repository::testing::{customer_name, image};
use crate::storage::{Faulty, Listed, Memory, Verb};
use std::collections::BTreeSet;
use std::sync::Arc;

const AGENT: [Role; 2] = [Role::Backup, Role::Restore];

/// The second host has these roles only, and the ledger has it under this name.
fn lab(roles: &[Role], name: &str) -> Lab {
    let lab = Lab::new(Arc::new(Memory::new()), &PolicyTerms::default());
    enter(&lab.open(), &with_roles(&lab.second, roles, name));
    lab
}

fn with_roles(host: &LocalHost, roles: &[Role], name: &str) -> HostBody {
    HostBody {
        roles: roles.to_vec(),
        name: name.to_string(),
        ..host.body()
    }
}

fn enter(customer: &Customer, body: &HostBody) {
    customer.append(|_| Ok(Body::Host(body.clone()))).unwrap();
}

/// What `vmkeep init` does on this host.
fn init(lab: &Lab, host: &Arc<LocalHost>, escrow: &[AgeRecipient]) -> Admitted {
    let terms = PolicyTerms::default();
    admit(
        &lab.storage,
        &lab.file,
        &customer_name(),
        host,
        escrow,
        &terms,
    )
    .unwrap()
}

/// Keys and ledger, but not what probes of the store leave.
fn stored(lab: &Lab) -> Vec<Listed> {
    let all = lab.storage.list("customers").unwrap();
    all.into_iter()
        .filter(|object| !object.name.as_str().contains("/probe/"))
        .collect()
}

fn newest_recipients(lab: &Lab) -> BTreeSet<String> {
    let state = lab.open().state();
    let newest = state.keys.last().unwrap();
    newest.recipients.iter().cloned().collect()
}

fn text_of(recipients: &[AgeRecipient]) -> BTreeSet<String> {
    recipients.iter().map(ToString::to_string).collect()
}

#[test]
fn a_host_without_the_role_admin_backs_up_where_its_name_and_policy_differ_from_the_ledgers() {
    let lab = lab(&AGENT, "as it was called before");
    let customer = lab.open_second();
    let shorter = PolicyTerms {
        max_retention: "30 days".to_string(),
        ..PolicyTerms::default()
    };
    let before = customer.state();
    let begun = begin_run(&customer, &lab.second, &shorter).unwrap();
    assert_eq!(begun.policies, Policies::NotOurs);
    let wanted = with_roles(&lab.second, &AGENT, "host1");
    assert_eq!(begun.unentered.as_ref(), Some(&wanted));
    assert_eq!(customer.state(), before);
    back_up(&customer, "web", &image(&[1]), true);

    // A host that may enters both.
    let keeper = lab.open();
    let entered = admit_host(&keeper, &lab.host, &wanted).unwrap();
    assert_eq!(entered, Admission::Created);
    let applied = apply_policy(&keeper, &lab.host, &shorter, false).unwrap();
    assert_eq!(applied, Policies::Applied);
    let begun = begin_run(&lab.open_second(), &lab.second, &shorter).unwrap();
    assert_eq!((begun.policies, begun.unentered), (Policies::Same, None));
}

#[test]
fn of_two_hosts_whose_policies_differ_none_undoes_the_others_until_somebody_confirms_it() {
    let lab = Lab::new(Arc::new(Memory::new()), &PolicyTerms::default());
    let of = |max_retention: &str| PolicyTerms {
        max_retention: max_retention.to_string(),
        ..PolicyTerms::default()
    };
    let (house, shorter, longer) = (PolicyTerms::default(), of("40 days"), of("50 days"));
    let (first, second) = (lab.open(), lab.open_second());
    let by_first = |terms, confirm| apply_policy(&first, &lab.host, terms, confirm).unwrap();
    let by_second = |terms, confirm| apply_policy(&second, &lab.second, terms, confirm).unwrap();
    let overruled = |by: &str| Policies::Overruled { by: by.to_string() };
    assert_eq!(by_first(&house, false), Policies::Same);
    assert_eq!(by_second(&shorter, false), Policies::Applied);
    for _ in 0..2 {
        assert_eq!(by_first(&house, false), overruled("host1"));
        assert_eq!(by_second(&shorter, false), Policies::Same);
    }
    assert_eq!(by_first(&house, true), Policies::Applied);
    assert_eq!(by_second(&shorter, false), overruled("host0"));
    // What somebody has changed since is no repetition.
    assert_eq!(by_second(&longer, false), Policies::Applied);
    assert_eq!(by_first(&longer, false), Policies::Same);
}

#[test]
fn a_host_with_the_role_admin_enters_its_new_name_and_keeps_its_roles() {
    let lab = lab(&[Role::Backup, Role::Admin], "as it was called before");
    let customer = lab.open_second();
    let begun = begin_run(&customer, &lab.second, &PolicyTerms::default()).unwrap();
    assert_eq!((begun.policies, begun.unentered), (Policies::Same, None));
    let wanted = with_roles(&lab.second, &[Role::Backup, Role::Admin], "host1");
    let state = customer.state();
    assert_eq!(state.hosts.get(&wanted.host), Some(&wanted));
}

#[test]
fn init_on_a_host_without_the_role_admin_opens_the_key_and_writes_nothing() {
    let lab = lab(&AGENT, "as it was called before");
    let escrow = [lab.stranger("escrow").0.identity().recipient()];
    let before = stored(&lab);
    let done = init(&lab, &lab.second, &escrow);
    assert_eq!(
        done,
        Admitted {
            outcome: Admission::Unchanged,
            has_escrow: false,
            unentered: Some(with_roles(&lab.second, &AGENT, "host1")),
            without_key: escrow.to_vec(),
        }
    );
    assert_eq!(stored(&lab), before);
}

#[test]
fn a_new_escrow_recipient_leaves_no_host_out_of_the_newest_key_file() {
    let lab = lab(&AGENT, "host1");
    let escrow = [lab.stranger("escrow").0.identity().recipient()];
    let done = init(&lab, &lab.host, &escrow);
    assert_eq!(done.outcome, Admission::Rewrapped);
    assert!(done.has_escrow);
    let hosts = [&lab.host, &lab.second].map(|host| host.identity().recipient());
    assert_eq!(
        newest_recipients(&lab),
        text_of(&[&escrow[..], &hosts].concat())
    );
    let before = stored(&lab);
    for host in [&lab.host, &lab.second] {
        let done = init(&lab, host, &escrow);
        assert_eq!(done.outcome, Admission::Unchanged);
        assert!(done.without_key.is_empty());
    }
    assert_eq!(stored(&lab), before);
}

#[test]
fn a_host_that_an_older_key_file_was_for_is_in_the_next_one_again() {
    let lab = lab(&AGENT, "host1");
    let own = [lab.host.identity().recipient()];
    let customer = lab.open();
    customer.wrap_key_for(lab.host.identity(), &own).unwrap();
    let (newcomer, _folder) = lab.stranger("host2");
    let body = with_roles(&newcomer, &AGENT, "host2");
    let entered = admit_host(&customer, &lab.host, &body).unwrap();
    assert_eq!(entered, Admission::Rewrapped);
    let all = [&lab.host, &lab.second, &newcomer].map(|host| host.identity().recipient());
    assert_eq!(newest_recipients(&lab), text_of(&all));
}

#[test]
fn a_host_whose_roles_were_taken_is_in_no_later_key_file() {
    let lab = lab(&AGENT, "host1");
    let customer = lab.open();
    let idle = with_roles(&lab.second, &[], "host1");
    let before = stored(&lab).len();
    let entered = admit_host(&customer, &lab.host, &idle).unwrap();
    assert_eq!(entered, Admission::Created);
    // The entry alone.
    assert_eq!(stored(&lab).len(), before + 1);
    let (newcomer, _folder) = lab.stranger("host2");
    let body = with_roles(&newcomer, &AGENT, "host2");
    admit_host(&customer, &lab.host, &body).unwrap();
    let both = [&lab.host, &newcomer].map(|host| host.identity().recipient());
    assert_eq!(newest_recipients(&lab), text_of(&both));
    assert_eq!(init(&lab, &lab.host, &[]).outcome, Admission::Unchanged);
}

#[test]
fn whoever_has_an_escrow_identity_is_not_told_that_there_is_none() {
    let lab = lab(&AGENT, "host1");
    let (escrow, _folder) = lab.stranger("escrow");
    assert!(!init(&lab, &lab.second, &[]).has_escrow);
    init(&lab, &lab.host, &[escrow.identity().recipient()]);
    let done = init(&lab, &escrow, &[]);
    assert_eq!(done.outcome, Admission::Unchanged);
    assert!(done.has_escrow && done.unentered.is_none());
}

#[test]
fn an_entry_that_would_take_a_role_from_everybody_or_mixes_two_hosts_is_refused() {
    let lab = lab(&AGENT, "host1");
    let customer = lab.open();
    let own = lab.host.body();
    let refused = |body: HostBody| {
        let before = (customer.state(), stored(&lab));
        let error = admit_host(&customer, &lab.host, &body).unwrap_err();
        assert_eq!(error.kind, JobErrorKind::Refused, "{error}");
        assert_eq!((customer.state(), stored(&lab)), before);
        error.message
    };
    // The id of this very host, pasted beside what another one printed.
    let (newcomer, _folder) = lab.stranger("host2");
    let pasted = HostBody {
        host: own.host,
        ..with_roles(&newcomer, &AGENT, "host2")
    };
    assert!(refused(pasted).contains("that of this very host"));
    let mixed = HostBody {
        recipient: own.recipient.clone(),
        ..lab.second.body()
    };
    assert!(refused(mixed.clone()).contains("an identity has one recipient"));
    for (roles, says) in [
        ([Role::Backup, Role::Prune], "only host with the role admin"),
        ([Role::Backup, Role::Admin], "only host with the role prune"),
    ] {
        let told = refused(with_roles(&lab.host, &roles, "host0"));
        assert!(told.contains(says), "{told}");
    }
    // Once another one has them, they can go.
    let heir = with_roles(&lab.second, &[Role::Prune, Role::Admin], "host1");
    admit_host(&customer, &lab.host, &heir).unwrap();
    let own = with_roles(&lab.host, &[Role::Backup], "host0");
    admit_host(&customer, &lab.host, &own).unwrap();
    assert!(!customer.has_role(Role::Admin));
    assert!(refused(mixed).contains("this host lets nobody in"));
    assert!(customer.state().voids.is_empty());
}

#[test]
fn a_host_is_given_the_key_before_its_roles() {
    let lab = lab(&AGENT, "host1");
    let store = Arc::new(Faulty::new(lab.storage.clone()));
    let customer = lab.open_on(store.clone(), &lab.host);
    let (newcomer, _folder) = lab.stranger("host2");
    let before = store.log().len();
    let body = with_roles(&newcomer, &AGENT, "host2");
    admit_host(&customer, &lab.host, &body).unwrap();
    let log = store.log().split_off(before);
    let created = log.iter().filter(|line| line.verb == Verb::Create);
    let mut folders: Vec<&str> = created
        .filter_map(|line| line.name.split('/').nth(2))
        .collect();
    // Names of key files that are taken are tried first.
    folders.dedup_by(|one, other| one == other && *one == "key");
    assert_eq!(folders, ["key", "ledger", "ledger"]);
}

#[test]
fn a_customer_that_no_host_prunes_is_an_alarm() {
    let lab = lab(&AGENT, "host1");
    let customer = lab.open();
    let told = || {
        let all =
            customer.with_state(|state| alarms(state, &[], &Looked::default(), lab.time.now()));
        let missing = all
            .into_iter()
            .filter(|alarm| alarm.kind == AlarmKind::RoleMissing);
        missing.map(|alarm| alarm.text).collect::<Vec<_>>()
    };
    assert_eq!(told(), Vec::<String>::new());
    // As another program may enter it.
    enter(
        &customer,
        &with_roles(&lab.host, &[Role::Backup, Role::Admin], "host0"),
    );
    assert_eq!(told().len(), 1);
    assert!(told()[0].starts_with("no host has the role prune: "));
    enter(&customer, &with_roles(&lab.host, &AGENT, "host0"));
    assert!(told()[0].starts_with("no host has the role prune or admin, "));
}

//! Hosts with a set clock and real state folders on one store, for tests of the jobs.

use super::*;
use crate::format::entry::Body;
use crate::format::repository_file::RepositoryFile;
use crate::model::{Clock, ClockReading, PointId, Writers};
use crate::policy::{HostClock, PolicyTerms};
use crate::repository::testing::{CHUNK, Time, customer_name};
use crate::repository::{
    Customer, Host, NewCustomer, WriteSettings, create_repository, new_repository,
};
use crate::storage::Storage;
use jiff::SignedDuration;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

struct SetClock(Time);

impl Clock for SetClock {
    fn read(&self) -> ClockReading {
        ClockReading {
            wall: self.0.now(),
            synchronised: false,
            boot: None,
        }
    }
}

/// The host of a state folder.
fn host_of(folder: &Path, name: &str, time: &Time) -> LocalHost {
    let folder = StateFolder::create(folder).unwrap();
    let (identity, _) = folder.ensure_identity("a test").unwrap();
    let clock = Arc::new(SetClock(time.clone()));
    LocalHost::new(
        identity,
        name.to_string(),
        folder,
        clock,
        HostClock::Trusted,
    )
}

/// A store with one customer, `acme`, and the two hosts that use it.
pub struct Lab {
    pub storage: Arc<dyn Storage>,
    pub time: Time,
    pub host: Arc<LocalHost>,
    pub second: Arc<LocalHost>,
    pub file: RepositoryFile,
    _folders: [tempfile::TempDir; 2],
}

impl Lab {
    pub fn new(storage: Arc<dyn Storage>, terms: &PolicyTerms) -> Self {
        let time = Time::new();
        let file = create_repository(
            &*storage,
            new_repository(time.now(), CHUNK as u32, Writers::Many),
        )
        .unwrap();
        let folders = [(); 2].map(|()| tempfile::tempdir().unwrap());
        let [host, second] =
            [0, 1].map(|at: usize| host_of(folders[at].path(), &format!("host{at}"), &time));
        let new = NewCustomer {
            repository: file.repository,
            name: &customer_name(),
            host: host.body(),
            recipients: vec![host.identity().recipient(), second.identity().recipient()],
            terms,
            writers: Writers::Many,
        };
        // The operator confirms the time at `init`; the host that goes on is another process.
        let init = host_of(folders[0].path(), "host0", &time);
        init.vouch_for_clock();
        Customer::create(&storage, &new, &init).unwrap();
        let lab = Lab {
            storage,
            time,
            host: Arc::new(host),
            second: Arc::new(second),
            file,
            _folders: folders,
        };
        let body = lab.second.body();
        lab.open().append(|_| Ok(Body::Host(body.clone()))).unwrap();
        lab
    }

    pub fn open(&self) -> Customer {
        self.open_on(self.storage.clone(), &self.host)
    }

    pub fn open_second(&self) -> Customer {
        self.open_on(self.storage.clone(), &self.second)
    }

    pub fn open_on(&self, storage: Arc<dyn Storage>, host: &Arc<LocalHost>) -> Customer {
        let settings = WriteSettings {
            pack_bytes: 4 * CHUNK,
            compression_level: 1,
            segment_records: 24,
            threads: 2,
        };
        let host_of_customer: Arc<dyn Host> = host.clone();
        Customer::open(
            storage,
            &customer_name(),
            self.file.repository,
            host.identity(),
            host_of_customer,
            settings,
        )
        .unwrap()
    }

    /// A host that nobody has let in, with what its state lives in.
    pub fn stranger(&self, name: &str) -> (Arc<LocalHost>, tempfile::TempDir) {
        let folder = tempfile::tempdir().unwrap();
        (Arc::new(host_of(folder.path(), name, &self.time)), folder)
    }

    /// The identity of the first host in a state folder of its own: that of a machine that was cloned.
    pub fn copy_of_host(&self) -> (Arc<LocalHost>, tempfile::TempDir) {
        let folder = tempfile::tempdir().unwrap();
        let identity = folder.path().join("identity");
        std::fs::copy(self.host.folder().identity_path(), identity).unwrap();
        (
            Arc::new(host_of(folder.path(), "host0", &self.time)),
            folder,
        )
    }

    /// The second host deletes nothing from now on.
    pub fn with_an_agent(self) -> Self {
        let second = Arc::into_inner(self.second).expect("nobody else has the host");
        Lab {
            second: Arc::new(second.as_agent()),
            ..self
        }
    }

    pub fn pass(&self, time: SignedDuration) {
        self.time.pass(time);
    }

    /// An operator says that the clock is right, however far it went.
    pub fn vouch(&self) {
        self.host.vouch_for_clock();
    }

    pub fn prune(&self, customer: &Customer) -> Result<Pruned, JobError> {
        prune_with(customer, &self.host, PruneRequest::default())
    }
}

pub fn prune_with(
    customer: &Customer,
    host: &LocalHost,
    request: PruneRequest,
) -> Result<Pruned, JobError> {
    let stop = AtomicBool::new(false);
    prune(customer, host, request, false, &Quiet, &stop)
}

/// Backs up, and says which point was committed.
pub fn back_up(customer: &Customer, vm: &str, bytes: &[u8], full: bool) -> PointId {
    let (point, result) = crate::repository::testing::backup(customer, vm, bytes, full);
    result.unwrap();
    point
}

//! vmkeep: the backup agent and retention enforcer for VM hosts.
//!
//! # The floors
//!
//! Folders show the architecture, imports point down only, and `tests/floors.rs` holds both as data.
//!
//! - **0 [`model`]**: the nouns. Ids, names, extents, pieces and the shape of trees, points, readings
//!   of a clock. *Absent:* I/O, clocks, serde. The secret [`model::Id`] has neither `Debug` nor
//!   `Display`: it opens what it names.
//! - **1 [`mod@format`], [`codec`]**: layouts, and what needs a key. The documentation of [`mod@format`] is the
//!   specification of the store; another reader can be written from it, and `tests` has one in
//!   Python. *Absent:* stores, files, policy. Two folders of one room: layouts that carry ids (nodes,
//!   point records) stand in `codec`.
//! - **1 [`policy`]**: schedule, retention, whether a clock is believed and whether a bucket will do, as
//!   pure functions with reasons. *Absent:* stores, keys, the clock (`now` is an argument).
//! - **1 [`tool`]**: a program of somebody else's, run within a time and a number of bytes. *Absent:* which
//!   tools there are, and what they say.
//! - **2 [`storage`]**: named immutable objects, created only if absent: a directory, an S3 bucket,
//!   memory, planned faults, a probe of what a store really does. Where the network is there is an
//!   async runtime: in `storage/s3` and in `notify`, and nowhere else. *Absent:* any idea of what an object means.
//! - **2 [`hypervisor`]**: the disks of a VM at one instant, and the images that a restore writes.
//!   Running VMs by QEMU's monitor (`hypervisor::qmp`) or by libvirt (`hypervisor::libvirt`), stopped
//!   ones by their images (`hypervisor::image`); all are read by one NBD client. A guard process
//!   (`hypervisor::guard`) lets a guest go whose agent died at the instant.
//!   *Absent:* chunks, keys, stores, the difference between full and incremental.
//! - **2 [`notify`]**: how messages reach people: webhooks, mail, journald's fields, pings. Each tries
//!   again what may pass, until a deadline, and says whether the receiver has it. *Absent:* which
//!   messages there are and when one is told again, where a secret lies, the clock.
//! - **3 [`repository`]**: the chunk store: ledger, sessions, index, trees, points, reclaim, sweep.
//!   *Absent:* disks, configuration, printing, the choice of a store, the clock (times come with a
//!   [`repository::Host`]).
//! - **4 [`jobs`]**: backup, restore, prune, verify, run and report, each plan → act → report; this
//!   host's state folder. *Absent:* concrete stores and hypervisors, printing, exit codes.
//! - **5 [`config`]**, **[`cli`]**: the configuration, and the program. The only place that prints,
//!   exits, reads the clock and picks a concrete store, hypervisor or target.
//!
//! Beside the floors, for tests and `scripts/fuzz` only: `fuzzing`, the table of fuzz targets. Each
//! stands beside the parser it attacks, in a module `hostile_bytes`.
//!
//! # A night
//!
//! `run` reads each customer's ledger, asks [`policy::due`] for each VM, puts the VMs of all customers into one order
//! ([`jobs::arrange`]), and for what is due:
//! `begin` → capture → spans of 256 chunks, taken by threads in any order → chunks: id, tag, looked
//! up, else compressed and sealed → packs, opened again before they are sent → index segment → point
//! record → `commit` in the next free slot of the ledger, checked against the entries before it.
//!
//! A full reads everything, and is held against what the newest point and the changes since it imply
//! (the *audit*). What differs shows that tracking lies: the incrementals of that week are suspect, and
//! every night is a full until an audit is clean.
//!
//! Then the prune: *expire* (an entry), *erase* (an entry, then the record is destroyed, and with it
//! the only way to what no other point reaches), *reclaim* (mark from the records that are left,
//! survivors into new packs, `condemn`, delete; the index forgets what was deleted) and *prove* (list
//! the store, explain each object by the ledger, sign a certificate for what was destroyed). Then a share of the
//! packs is read, and who is to know is told ([`policy::announcements`], [`notify`]).
//!
//! # What is different from what one may expect, and why
//!
//! - No checkpoints are written into the store; `checkpoint` entries are reserved in the format. A host
//!   keeps its own, as a cache: a replay costs some 0.1 ms an entry at each opening. It is believed by
//!   the program that made it if every entry is still listed and the last has the bytes it had; after seven
//!   days if all have, by the chain of their hashes; for four weeks. `verify`, `ledger verify` and whoever has
//!   no keys read from genesis.
//! - The age format is our own 700 lines on `ring` and `x25519-dalek`: its library brings 150 crates.
//!   The public `age` tool is held against it in the tests, and `minisign` against the certificates.
//! - Without a weekday (`full_day = "auto"`) a full is due six nights after the last good one, not on a day that a
//!   hash gives: hashes of the VMs of one host leave some nights with twice the fulls of others, and after a night
//!   that failed a full every seventh night is late. Each night of a host takes a sixth of its fulls
//!   ([`policy::fulls_tonight`]): one that is six nights old can wait for the next, one of seven cannot. It costs a
//!   sixth more reading, hardly any storage: what has not changed is not stored again.
//! - A run that is in its window begins nothing after its end; one outside of it does what was missed at once. The
//!   timer starts one of each. A customer is pruned as soon as the last of its VMs is done and does not wait
//!   for those of others; every verification comes after the prunes.
//! - The tags of destroyed chunks leave the index in the same prune as their bytes: with a tag, a
//!   holder of the customer key could go on testing guesses at what is gone.
//! - A pack's dead bytes count as those of every erasure since its last rewriting. What exactly died is
//!   not known once the records are gone; so deadlines are rather too early than too late.
//! - A machine that stands still takes its kernel's word and its uptime with it: two sources that agree
//!   and are both late, which shows only when another machine is right. So thinning waits as much
//!   longer as the longest time without a witness after a point's commit, where that is over 36 hours.
//! - Restore points that a lone clock dated count from the last witnessed time before, and go by it. After a reboot
//!   a host whose store is a directory has no second source, so that all of them would go at once. Who vouches for
//!   the clock there vouches for what it said since it went on as the uptime did, and those points count from their
//!   own time from then on (section 12.4 of the format): two sources, one of them late.
//! - A host remembers the first entry of each customer it has met, and takes no other ledger under that name. An
//!   entry that is damaged is read past by what this very program once made of it: the chain names its hash.
//! - A prune goes by the policy in the ledger. A configuration that differs is applied by `run`, and a
//!   shortening that would expire more than one night at once only by `prune --confirm`. So is one that another
//!   host has replaced since this one wrote it: two hosts that differ would undo each other's night after night.
//! - A run beside one that is late prunes and tells ([`jobs::UnderWay::is_late`]). The late one starts it: systemd
//!   starts no service that is active, and cron's lock none.
//! - Objects that vmkeep cannot have written are reported by a prune and removed by
//!   `prune --confirm` only; until then no certificate is signed. Key files that the ledger does not
//!   name, files under names that no object can have, and what stands beside the customers (a copy of one, say)
//!   are for a person to move away. Nor is one
//!   signed while another process's unfinished file is in the store: the next prune signs it.

pub mod cli;
pub mod codec;
pub mod config;
pub mod format;
#[cfg(any(test, fuzzing))]
pub mod fuzzing;
pub mod hypervisor;
pub mod jobs;
pub mod model;
pub mod notify;
pub mod policy;
pub mod repository;
pub mod storage;
pub mod tool;

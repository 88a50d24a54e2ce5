//! The test's own books: what each restore point must hold, and until when each frame may exist.

use super::guest::Picture;
use super::scanner::Scan;
use jiff::Timestamp;
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use vmkeep::model::{PointId, Tag};

/// What is known of a restore point since it was first listed.
#[derive(Debug, Clone)]
pub struct Known {
    pub customer: String,
    pub vm: String,
    pub taken_at: Timestamp,
    pub expires_at: Timestamp,
    pub deadline: Timestamp,
    pub disks: BTreeMap<String, Picture>,
}

#[derive(Default)]
pub struct Books {
    pub points: BTreeMap<PointId, Known>,
    pub listed: BTreeSet<PointId>,
    /// For each tag the latest deadline of the points that ever reached it.
    deadlines: HashMap<Tag, Timestamp>,
}

fn text<'a>(point: &'a Value, field: &str) -> &'a str {
    point
        .get(field)
        .and_then(Value::as_str)
        .unwrap_or_else(|| panic!("a listed point has {field:?}: {point}"))
}

fn instant(point: &Value, field: &str) -> Timestamp {
    text(point, field)
        .parse()
        .unwrap_or_else(|error| panic!("{field} of {point}: {error}"))
}

pub fn id_of(point: &Value) -> PointId {
    text(point, "id").parse().unwrap()
}

impl Books {
    /// Takes the list of points. `pictures` says what the disks of a VM (`customer/vm`) hold now;
    /// it is asked for each point that was not listed before. Returns the new ones.
    pub fn list(
        &mut self,
        listed: &[Value],
        pictures: impl Fn(&str) -> BTreeMap<String, Picture>,
    ) -> Vec<PointId> {
        let mut new = Vec::new();
        self.listed.clear();
        for point in listed {
            let id = id_of(point);
            self.listed.insert(id);
            if self.points.contains_key(&id) {
                continue;
            }
            let (customer, vm) = (text(point, "customer"), text(point, "vm"));
            let known = Known {
                customer: customer.to_string(),
                vm: vm.to_string(),
                taken_at: instant(point, "taken_at"),
                expires_at: instant(point, "expires_at"),
                deadline: instant(point, "deadline"),
                disks: pictures(&format!("{customer}/{vm}")),
            };
            let disks: BTreeMap<String, u64> = point["disks"]
                .as_array()
                .unwrap_or_else(|| panic!("a listed point has disks: {point}"))
                .iter()
                .map(|disk| {
                    (
                        text(disk, "name").to_string(),
                        disk["size_bytes"].as_u64().unwrap(),
                    )
                })
                .collect();
            let expected = known.disks.iter();
            let expected = expected.map(|(name, picture)| (name.clone(), picture.size));
            assert_eq!(disks, expected.collect(), "disks of {id}");
            self.points.insert(id, known);
            new.push(id);
        }
        new
    }

    /// Takes what the scanner found: every listed point must be there and hold exactly what its
    /// disks held; every record must be of a point that was listed once.
    #[track_caller]
    pub fn compare(&mut self, scan: &Scan) {
        assert!(scan.damage().is_empty(), "{:#?}", scan.damage());
        assert!(
            scan.unopened_records.is_empty(),
            "records without a key: {:?}",
            scan.unopened_records
        );
        for id in &self.listed {
            assert!(
                scan.points.contains_key(id),
                "{id} is listed, and has no record"
            );
        }
        for (id, walked) in &scan.points {
            let known = self
                .points
                .get(id)
                .unwrap_or_else(|| panic!("{} was never listed", walked.place));
            assert_eq!(
                (walked.customer.as_str(), walked.record.vm.as_str()),
                (known.customer.as_str(), known.vm.as_str())
            );
            let names: BTreeSet<&str> =
                walked.disks.iter().map(|disk| disk.name.as_str()).collect();
            assert!(names.iter().eq(known.disks.keys()), "{id}: {names:?}");
            for disk in &walked.disks {
                assert!(
                    disk.is(&known.disks[&disk.name]),
                    "{id} ({} {} of {}): not what the disk held",
                    known.vm,
                    disk.name,
                    known.taken_at
                );
            }
            for tag in &walked.tags {
                let latest = self.deadlines.entry(*tag).or_insert(known.deadline);
                *latest = known.deadline.max(*latest);
            }
        }
    }

    /// What is in the store at `scan` although its time is over at `now`, or was never explained.
    pub fn overdue(&self, scan: &Scan, now: Timestamp) -> Vec<String> {
        let mut found = Vec::new();
        for (id, walked) in &scan.points {
            let known = &self.points[id];
            if known.deadline <= now {
                let place = &walked.place;
                found.push(format!(
                    "the record of {id}, due {}: {place}",
                    known.deadline
                ));
            }
        }
        let live: HashSet<Tag> = scan.reachable_tags();
        for tag in scan.tags().filter(|tag| !live.contains(tag)) {
            match self.deadlines.get(tag) {
                Some(deadline) if *deadline > now => {}
                Some(deadline) => {
                    found.push(format!(
                        "frame {tag}, due {deadline}: {:?}",
                        scan.places_of(tag)
                    ));
                }
                None => found.push(format!(
                    "frame {tag}, of no restore point: {:?}",
                    scan.places_of(tag)
                )),
            }
        }
        found.extend(scan.broken_frames(|tag| self.deadlines.contains_key(tag)));
        found
    }

    /// Frames that nothing reaches, as far as they may still be there: number and earliest
    /// deadline.
    pub fn dead(&self, scan: &Scan) -> (usize, Option<Timestamp>) {
        let live = scan.reachable_tags();
        let dead: Vec<&Tag> = scan.tags().filter(|tag| !live.contains(tag)).collect();
        let earliest = dead.iter().filter_map(|tag| self.deadlines.get(tag)).min();
        (dead.len(), earliest.copied())
    }

    pub fn has_known(&self, tag: &Tag) -> bool {
        self.deadlines.contains_key(tag)
    }
}

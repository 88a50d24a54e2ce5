use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;
use vmkeep::hypervisor::libvirt::LibvirtSource;
use vmkeep::hypervisor::{Capture, CapturedDisk, Changes, Hypervisor, Outcome, Reading, SinceMark};
use vmkeep::model::{DiskName, Extent};

/// What a store would hold: the newest point's disks.
#[derive(Default)]
pub struct Store {
    pub disks: BTreeMap<String, (Vec<u8>, Option<String>)>,
}

/// How a disk was read: which bytes changed since the newest point, or why that is unknown.
pub type Told = BTreeMap<String, Result<u64, String>>;

fn read(disk: &dyn CapturedDisk, extent: Extent, into: &mut [u8]) {
    let range = extent.offset as usize..extent.end() as usize;
    disk.read_at(extent.offset, &mut into[range]).unwrap();
}

fn read_all(disk: &dyn CapturedDisk) -> Vec<u8> {
    let mut content = vec![0; disk.size_bytes() as usize];
    for extent in disk.allocated(Extent::new(0, disk.size_bytes())).unwrap() {
        read(disk, extent, &mut content);
    }
    content
}

impl Store {
    pub fn since(&self) -> Vec<SinceMark> {
        self.disks
            .iter()
            .map(|(name, (content, mark))| SinceMark {
                disk: DiskName::new(name).unwrap(),
                size_bytes: content.len() as u64,
                alignment_bytes: 65536,
                mark: mark.clone(),
            })
            .collect()
    }

    /// The point that the capture makes of this one, compared with a full reading of every byte.
    pub fn next(&self, capture: &dyn Capture) -> (Store, Told) {
        let mut next = Store::default();
        let mut told = Told::new();
        for disk in capture.disks() {
            let name = disk.name().to_string();
            let mut whole = vec![0; disk.size_bytes() as usize];
            read(disk, Extent::new(0, disk.size_bytes()), &mut whole);
            let (content, how) = match disk.changes() {
                Changes::Unknown(reason) => (read_all(disk), Err(reason.clone())),
                Changes::Extents(extents) => {
                    let mut content = self.disks[&name].0.clone();
                    for extent in extents {
                        read(disk, *extent, &mut content);
                    }
                    (
                        content,
                        Ok(extents.iter().map(|extent| extent.length).sum()),
                    )
                }
            };
            assert!(content == whole, "{name} is not what a full reading gives");
            told.insert(name.clone(), how);
            let mark = disk.mark().map(str::to_string);
            next.disks.insert(name, (content, mark));
        }
        (next, told)
    }

    /// One night: what a backup does with a source.
    pub fn night(&mut self, source: &LibvirtSource, outcome: Outcome) -> Told {
        source.recover().unwrap();
        let capture = source.open(&self.since(), Reading::Changes).unwrap();
        let (next, told) = self.next(&*capture);
        capture.still_consistent().unwrap();
        capture.close(outcome).unwrap();
        if outcome == Outcome::Committed {
            *self = next;
        }
        told
    }

    pub fn sha256(&self, disk: &str, folder: &Path) -> String {
        let path = folder.join("content");
        std::fs::write(&path, &self.disks[disk].0).unwrap();
        let output = Command::new("sha256sum").arg(&path).output().unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        text.split(' ').next().unwrap().to_string()
    }
}

#[track_caller]
pub fn reason<'a>(told: &'a Told, disk: &str) -> &'a str {
    match &told[disk] {
        Err(reason) => reason,
        Ok(changed) => panic!("{disk}: {changed} bytes changed"),
    }
}

//! A VM in memory whose guest writes while it is tracked, and whose tracking may lie.

use crate::hypervisor::{
    Capture, CaptureError, CaptureErrorKind, CapturedDisk, Changes, Consistency, Hypervisor,
    Outcome, Reading, SinceMark,
};
use crate::model::{DiskName, Extent};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Blocks that are told as holes where they are zero; smaller than a chunk.
const BLOCK: u64 = 4096;

#[derive(Debug, Clone)]
struct GuestDisk {
    name: DiskName,
    bytes: Vec<u8>,
    /// Written since the newest mark that stands, as tracking saw it.
    dirty: Vec<Extent>,
    /// Written since a capture whose outcome is not known yet.
    after_capture: Vec<Extent>,
    mark: Option<String>,
}

#[derive(Default)]
struct Guest {
    disks: Vec<GuestDisk>,
    captures: u64,
    readings: Vec<Reading>,
    left: Vec<String>,
}

/// The VM, as the guest inside and as the hypervisor outside of it. Clones are the same VM.
#[derive(Clone, Default)]
pub struct FakeVm(Arc<Mutex<Guest>>);

pub fn disk_name(name: &str) -> DiskName {
    DiskName::new(name).expect("a name")
}

impl FakeVm {
    pub fn new(disks: &[(&str, Vec<u8>)]) -> Self {
        let vm = FakeVm::default();
        for (name, bytes) in disks {
            vm.attach(name, bytes.clone());
        }
        vm
    }

    fn guest(&self) -> MutexGuard<'_, Guest> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn with_disk<T>(&self, name: &str, act: impl FnOnce(&mut GuestDisk) -> T) -> T {
        let mut guest = self.guest();
        let disk = guest
            .disks
            .iter_mut()
            .find(|disk| disk.name.as_str() == name);
        act(disk.expect("a disk of the VM"))
    }

    pub fn attach(&self, name: &str, bytes: Vec<u8>) {
        self.guest().disks.push(GuestDisk {
            name: disk_name(name),
            bytes,
            dirty: Vec::new(),
            after_capture: Vec::new(),
            mark: None,
        });
    }

    pub fn detach(&self, name: &str) {
        self.guest().disks.retain(|disk| disk.name.as_str() != name);
    }

    pub fn bytes(&self, name: &str) -> Vec<u8> {
        self.with_disk(name, |disk| disk.bytes.clone())
    }

    /// The guest writes, and tracking sees it.
    pub fn write(&self, name: &str, offset: u64, data: &[u8]) {
        self.hide(name, offset, data);
        self.with_disk(name, |disk| {
            let extent = Extent::new(offset, data.len() as u64);
            disk.dirty.push(extent);
            disk.after_capture.push(extent);
        });
    }

    /// The guest writes, and tracking does not see it.
    pub fn hide(&self, name: &str, offset: u64, data: &[u8]) {
        self.with_disk(name, |disk| {
            disk.bytes[offset as usize..][..data.len()].copy_from_slice(data);
        });
    }

    /// Grows with zeros, or shrinks. Tracking goes on.
    pub fn resize(&self, name: &str, size_bytes: u64) {
        self.with_disk(name, |disk| disk.bytes.resize(size_bytes as usize, 0));
    }

    /// As after a reboot of a host that kept no bitmaps.
    pub fn forget_tracking(&self) {
        for disk in &mut self.guest().disks {
            disk.mark = None;
        }
    }

    /// What no recovery can put right.
    pub fn leaves(&self, what: &str) {
        self.guest().left.push(what.to_string());
    }

    /// How it was read, capture by capture.
    pub fn readings(&self) -> Vec<Reading> {
        self.guest().readings.clone()
    }
}

struct FakeDisk {
    disk: GuestDisk,
    changes: Changes,
    /// Where reads are allowed.
    readable: Option<Vec<Extent>>,
    mark: String,
}

struct FakeCapture {
    vm: FakeVm,
    disks: Vec<FakeDisk>,
}

/// Sorted and disjoint, as the seam wants them, and otherwise as the guest wrote.
fn sorted(extents: &[Extent], size_bytes: u64) -> Vec<Extent> {
    let whole = Extent::new(0, size_bytes);
    let mut all: Vec<Extent> = extents
        .iter()
        .filter_map(|extent| extent.intersection(&whole))
        .collect();
    all.sort_unstable();
    let mut joined: Vec<Extent> = Vec::new();
    for extent in all {
        match joined.last_mut() {
            Some(last) if last.end() >= extent.offset => {
                last.length = last.end().max(extent.end()) - last.offset;
            }
            _ => joined.push(extent),
        }
    }
    joined
}

impl Hypervisor for FakeVm {
    fn open(
        &self,
        since: &[SinceMark],
        reading: Reading,
    ) -> Result<Box<dyn Capture>, CaptureError> {
        let mut guest = self.guest();
        guest.captures += 1;
        guest.readings.push(reading);
        let mark = format!("capture-{}", guest.captures);
        let disks = guest.disks.iter_mut().map(|disk| {
            disk.after_capture.clear();
            let since = since.iter().find(|since| since.disk == disk.name);
            let known = since.and_then(|since| since.mark.as_ref());
            let size_bytes = disk.bytes.len() as u64;
            let changes = match known.filter(|mark| Some(*mark) == disk.mark.as_ref()) {
                Some(_) => Changes::Extents(sorted(&disk.dirty, size_bytes)),
                None => Changes::Unknown("no tracking since that mark".to_string()),
            };
            let readable = match (&changes, since, reading) {
                (Changes::Extents(extents), Some(since), Reading::Changes)
                    if since.size_bytes == size_bytes =>
                {
                    let align = u64::from(since.alignment_bytes);
                    let rounded: Vec<Extent> = extents
                        .iter()
                        .map(|extent| {
                            let start = extent.offset / align * align;
                            Extent::new(start, extent.end().next_multiple_of(align) - start)
                        })
                        .collect();
                    Some(sorted(&rounded, size_bytes))
                }
                _ => None,
            };
            FakeDisk {
                disk: disk.clone(),
                changes,
                readable,
                mark: mark.clone(),
            }
        });
        let disks = disks.collect();
        Ok(Box::new(FakeCapture {
            vm: self.clone(),
            disks,
        }))
    }

    fn recover(&self) -> Result<Vec<String>, CaptureError> {
        Ok(self.guest().left.clone())
    }

    fn release(&self) -> Result<Vec<String>, CaptureError> {
        self.forget_tracking();
        Ok(Vec::new())
    }
}

impl Capture for FakeCapture {
    fn disks(&self) -> Vec<&dyn CapturedDisk> {
        self.disks
            .iter()
            .map(|disk| disk as &dyn CapturedDisk)
            .collect()
    }

    fn definition(&self) -> Option<(&str, &[u8])> {
        None
    }

    fn consistency(&self) -> Consistency {
        Consistency::Crash
    }

    fn notes(&self) -> &[String] {
        &[]
    }

    fn still_consistent(&self) -> Result<(), CaptureError> {
        Ok(())
    }

    fn close(self: Box<Self>, outcome: Outcome) -> Result<(), CaptureError> {
        if outcome == Outcome::Committed {
            for captured in &self.disks {
                let name = captured.disk.name.as_str();
                let there = |disk: &GuestDisk| disk.name == captured.disk.name;
                if self.vm.guest().disks.iter().any(there) {
                    self.vm.with_disk(name, |disk| {
                        disk.mark = Some(captured.mark.clone());
                        disk.dirty = std::mem::take(&mut disk.after_capture);
                    });
                }
            }
        }
        Ok(())
    }
}

impl CapturedDisk for FakeDisk {
    fn name(&self) -> &DiskName {
        &self.disk.name
    }

    fn size_bytes(&self) -> u64 {
        self.disk.bytes.len() as u64
    }

    fn changes(&self) -> &Changes {
        &self.changes
    }

    fn mark(&self) -> Option<&str> {
        Some(&self.mark)
    }

    fn allocated(&self, range: Extent) -> Result<Vec<Extent>, CaptureError> {
        let mut found = Vec::new();
        let mut offset = range.offset / BLOCK * BLOCK;
        while offset < range.end() {
            let block = Extent::new(offset, BLOCK).intersection(&range);
            if let Some(block) = block {
                let bytes = &self.disk.bytes[block.offset as usize..block.end() as usize];
                if bytes.iter().any(|byte| *byte != 0) {
                    found.push(block);
                }
            }
            offset += BLOCK;
        }
        Ok(sorted(&found, self.size_bytes()))
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<(), CaptureError> {
        let wanted = Extent::new(offset, buffer.len() as u64);
        let allowed = self.readable.as_ref().is_none_or(|readable| {
            readable
                .iter()
                .any(|extent| extent.intersection(&wanted) == Some(wanted))
        });
        if !allowed || wanted.end() > self.size_bytes() {
            return Err(CaptureError::new(
                CaptureErrorKind::Io,
                &self.disk.name,
                format!("a read at {offset} where nothing was to be read"),
            ));
        }
        buffer.copy_from_slice(&self.disk.bytes[offset as usize..wanted.end() as usize]);
        Ok(())
    }
}

//! The directory of a pack, from the pack itself: its first bytes and its last; and which packs there are.

use super::sealed::SealedCustomer;
use super::{RepositoryError, RepositoryErrorKind};
use crate::format::names::{CustomerNames, ObjectRole};
use crate::format::pack::{self, DirectoryEntry, PackKind};
use crate::model::{ObjectName, PackName};
use crate::storage::{Storage, StorageErrorKind};
use std::collections::BTreeMap;

/// What a pack holds.
pub(super) enum Directory {
    Entries(Vec<DirectoryEntry>),
    Gone,
    Damaged,
}

/// The directory of a pack, from the pack itself.
pub(super) fn directory(
    customer: &SealedCustomer,
    name: &PackName,
) -> Result<Directory, RepositoryError> {
    match read_directory(customer, name) {
        Ok(entries) => Ok(Directory::Entries(entries)),
        Err(error) if error.kind == RepositoryErrorKind::Storage(StorageErrorKind::NotFound) => {
            Ok(Directory::Gone)
        }
        Err(error) if error.is_damage() => Ok(Directory::Damaged),
        Err(error) => Err(error),
    }
}

pub(super) fn read_directory(
    customer: &SealedCustomer,
    name: &PackName,
) -> Result<Vec<DirectoryEntry>, RepositoryError> {
    let object = customer.names().pack(name);
    let size_bytes = customer.storage().size_bytes(&object)?;
    let (_, entries) = directory_of(&**customer.storage(), &object, size_bytes)?;
    Ok(entries)
}

/// What a pack of this size is and holds.
pub(super) fn directory_of(
    storage: &dyn Storage,
    object: &ObjectName,
    size_bytes: u64,
) -> Result<(PackKind, Vec<DirectoryEntry>), RepositoryError> {
    let mut trailer = [0; pack::TRAILER_BYTES];
    let at = size_bytes.saturating_sub(pack::TRAILER_BYTES as u64);
    storage.read_range(object, at, &mut trailer)?;
    let damaged = |detail: &dyn std::fmt::Display| RepositoryError::damaged(object, detail);
    let range = pack::directory_range(&trailer, size_bytes).map_err(|error| damaged(&error))?;
    let mut header = [0; pack::HEADER_BYTES];
    storage.read_range(object, 0, &mut header)?;
    let length =
        usize::try_from(range.end - range.start).map_err(|_| damaged(&"impossible directory"))?;
    let mut bytes = vec![0; length];
    storage.read_range(object, range.start, &mut bytes)?;
    let entries =
        pack::parse_directory(&header, &bytes, range.start).map_err(|error| damaged(&error))?;
    let kind = pack::parse_header(&header)
        .map_err(|error| damaged(&error))?
        .kind;
    Ok((kind, entries))
}

/// The packs that the store lists, with their sizes.
pub(super) type ListedPacks = BTreeMap<PackName, u64>;

pub(super) fn listed_packs(
    storage: &dyn Storage,
    names: &CustomerNames,
) -> Result<ListedPacks, RepositoryError> {
    let listed = storage.list(&names.packs_prefix())?;
    let packs = listed
        .iter()
        .filter_map(|object| match names.role(&object.name) {
            ObjectRole::Pack(name) => Some((name, object.size_bytes)),
            _ => None,
        });
    Ok(packs.collect())
}

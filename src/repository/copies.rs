//! Which copies of its objects a host may keep: of what the ledger's end names, and of nothing that is over.
//!
//! Asked at every opening. The segments are in the ledger; which packs are left of those that were born, only
//! the index says, since a merge forgets what was condemned and deleted. As long as no segment has changed,
//! none was forgotten, and the ledger's word is enough.

use super::RepositoryError;
use super::index::Index;
use super::sealed::SealedCustomer;
use crate::format::names::ObjectRole;
use crate::model::{ObjectName, PackName};
use std::sync::Arc;

/// How much is known of the packs of which there are copies.
enum Packs {
    /// They were looked through under these segments.
    LookedThrough,
    Listed(Arc<Index>),
    /// Nothing: then none may stay.
    Unknown,
}

/// Says of each copy whether it may stay.
pub struct Copies<'a> {
    customer: &'a SealedCustomer,
    packs: Packs,
    segments: [u8; 32],
}

impl SealedCustomer {
    /// `copies`: the names of all. `looked_through`: [`Copies::segments`] when that was last done.
    /// The error says why no pack may stay.
    pub fn copies(
        &self,
        copies: &[ObjectName],
        looked_through: Option<&[u8]>,
    ) -> (Copies<'_>, Option<RepositoryError>) {
        let segments = self.with_state(|state| {
            let mut hasher = blake3::Hasher::new();
            for name in state.segments.keys() {
                hasher.update(name.to_string().as_bytes());
            }
            *hasher.finalize().as_bytes()
        });
        let is_pack = |name: &ObjectName| matches!(self.names().role(name), ObjectRole::Pack(_));
        let is_known = looked_through == Some(&segments) || !copies.iter().any(is_pack);
        let (packs, error) = match is_known {
            true => (Packs::LookedThrough, None),
            false => match self.index_as_read() {
                Ok(index) => (Packs::Listed(index), None),
                Err(error) => (Packs::Unknown, Some(error)),
            },
        };
        let customer = self;
        let copies = Copies {
            customer,
            packs,
            segments,
        };
        (copies, error)
    }
}

impl Copies<'_> {
    /// The segments under which this was asked, in short.
    pub fn segments(&self) -> &[u8] {
        &self.segments
    }

    pub fn may_stay(&self, name: &ObjectName) -> bool {
        match self.customer.names().role(name) {
            ObjectRole::Segment(segment) => {
                let current = |state: &super::State| state.segments.contains_key(&segment);
                self.customer.with_state(current)
            }
            ObjectRole::Pack(pack) => self.may_pack_stay(&pack),
            _ => false,
        }
    }

    fn may_pack_stay(&self, pack: &PackName) -> bool {
        let is_listed = match &self.packs {
            Packs::LookedThrough => true,
            Packs::Listed(index) => index.number_of(pack).is_some(),
            Packs::Unknown => false,
        };
        self.customer.with_state(|state| {
            // What another process of this host is writing stands in no segment yet.
            let under_way = state.open.contains_key(&pack.session);
            let born = is_listed && state.born.contains_key(&pack.session);
            (under_way || born) && !state.is_condemned(pack)
        })
    }
}

//! Object names: the layout of a repository in a store.

use crate::model::{
    CustomerName, EntryHash, NameError, ObjectHash, ObjectName, PackName, PointId, SegmentName,
    SessionId, Writers,
};

fn object(name: String) -> ObjectName {
    ObjectName::new(&name).expect("parts are checked names, hexadecimal digits and numbers")
}

/// Everything below this belongs to one customer or another.
const CUSTOMERS: &str = "customers/";
/// Below `probe/`.
const SPENT_PROBES: &str = "spent/";

pub fn repository_file() -> ObjectName {
    object("vmkeep.json".to_string())
}

/// The hash of what an index segment or a pack holds, as its name says it.
pub fn content_hash(name: &ObjectName) -> Option<ObjectHash> {
    let rest = name.as_str().strip_prefix(CUSTOMERS)?;
    let (_, rest) = rest.split_once('/')?;
    let (folder, rest) = rest.split_once('/')?;
    match folder {
        "index" => rest.parse().ok().map(|name: SegmentName| name.hash),
        "packs" => rest.parse().ok().map(|name: PackName| name.hash),
        _ => None,
    }
}

/// Where all customers are.
pub fn customers_prefix() -> &'static str {
    CUSTOMERS.trim_end_matches('/')
}

/// Whose an object is, by its name.
pub fn customer_of(name: &ObjectName) -> Option<CustomerName> {
    let rest = name.as_str().strip_prefix(CUSTOMERS)?;
    let (customer, _) = rest.split_once('/')?;
    CustomerName::new(customer).ok()
}

/// The names below one customer's prefix.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CustomerNames {
    customer: CustomerName,
    prefix: String,
    /// Decides what the entries of its ledger are called.
    writers: Writers,
}

/// What a name below a customer's prefix says it is.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum ObjectRole {
    Key(u32),
    Ledger(u64),
    /// An entry where one host writes: of several with one number, one counts.
    Rival(u64, EntryHash),
    Pack(PackName),
    Segment(SegmentName),
    Point(PointId),
    /// Certificate or its signature; the file name.
    Certificate(String),
    /// An object of a capability probe; carries nothing.
    Probe,
    /// One whose maker had done with it and could not delete it.
    SpentProbe,
    Foreign,
}

/// Sixteen digits and nothing else: a sign would be another spelling.
fn slot_number(digits: &str) -> Option<u64> {
    let is_number = digits.len() == 16 && digits.bytes().all(|digit| digit.is_ascii_digit());
    is_number.then(|| digits.parse().ok()).flatten()
}

impl CustomerNames {
    pub fn new(customer: &CustomerName) -> Self {
        CustomerNames {
            customer: customer.clone(),
            prefix: format!("{CUSTOMERS}{customer}"),
            writers: Writers::Many,
        }
    }

    pub fn written_by(self, writers: Writers) -> Self {
        CustomerNames { writers, ..self }
    }

    pub fn writers(&self) -> Writers {
        self.writers
    }

    pub fn customer(&self) -> &CustomerName {
        &self.customer
    }

    pub fn prefix(&self) -> &str {
        &self.prefix
    }

    pub fn key(&self, number: u32) -> ObjectName {
        object(format!("{}/key/{number}.age", self.prefix))
    }

    pub fn keys_prefix(&self) -> String {
        format!("{}/key", self.prefix)
    }

    pub fn ledger(&self, seq: u64) -> ObjectName {
        object(format!("{}/ledger/{seq:016}", self.prefix))
    }

    /// An entry where one host writes. Its hash is in its name, so that what another process left under
    /// way can land beside it and never on it.
    pub fn rival(&self, seq: u64, hash: &EntryHash) -> ObjectName {
        object(format!("{}/{hash}", self.slot(seq)))
    }

    /// Where the entries of one number are, where one host writes.
    pub fn slot(&self, seq: u64) -> String {
        format!("{}/ledger/{seq:016}", self.prefix)
    }

    pub fn ledger_prefix(&self) -> String {
        format!("{}/ledger", self.prefix)
    }

    pub fn pack(&self, pack: &PackName) -> ObjectName {
        object(format!("{}/packs/{pack}", self.prefix))
    }

    pub fn packs_prefix(&self) -> String {
        format!("{}/packs", self.prefix)
    }

    pub fn session_packs(&self, session: &SessionId) -> String {
        format!("{}/packs/{session}", self.prefix)
    }

    pub fn segment(&self, segment: &SegmentName) -> ObjectName {
        object(format!("{}/index/{segment}", self.prefix))
    }

    pub fn segments_prefix(&self) -> String {
        format!("{}/index", self.prefix)
    }

    pub fn session_segments(&self, session: &SessionId) -> String {
        format!("{}/index/{session}", self.prefix)
    }

    pub fn point(&self, point: &PointId) -> ObjectName {
        object(format!("{}/points/{point}", self.prefix))
    }

    /// Of no object: beside a host's copies, under which segments it last looked through them.
    pub fn looked_through(&self) -> ObjectName {
        object(format!("{}/looked-through", self.prefix))
    }

    /// What a probe of the store leaves carries nothing.
    pub fn probes_prefix(&self) -> String {
        format!("{}/probe", self.prefix)
    }

    pub fn points_prefix(&self) -> String {
        format!("{}/points", self.prefix)
    }

    /// A file of a certificate: `<id>.json` or `<id>.json.minisig`.
    pub fn certificate(&self, file: &str) -> Result<ObjectName, NameError> {
        ObjectName::new(&format!("{}/certificates/{file}", self.prefix))
    }

    /// What `name` is, judged by its name alone.
    pub fn role(&self, name: &ObjectName) -> ObjectRole {
        let Some(rest) = name
            .as_str()
            .strip_prefix(&self.prefix)
            .and_then(|rest| rest.strip_prefix('/'))
        else {
            return ObjectRole::Foreign;
        };
        let Some((folder, rest)) = rest.split_once('/') else {
            return ObjectRole::Foreign;
        };
        // Numbers have one spelling: `key/01.age` is not `key/1.age`.
        let role = match folder {
            "key" => rest
                .strip_suffix(".age")
                .and_then(|number| number.parse().ok())
                .filter(|number| self.key(*number) == *name)
                .map(ObjectRole::Key),
            "ledger" => match rest.split_once('/') {
                None => slot_number(rest).map(ObjectRole::Ledger),
                Some((seq, hash)) => match (slot_number(seq), hash.parse()) {
                    (Some(seq), Ok(hash)) => Some(ObjectRole::Rival(seq, hash)),
                    _ => None,
                },
            },
            "packs" => rest.parse().ok().map(ObjectRole::Pack),
            "index" => rest.parse().ok().map(ObjectRole::Segment),
            "points" => rest.parse().ok().map(ObjectRole::Point),
            "certificates" if !rest.contains('/') => {
                Some(ObjectRole::Certificate(rest.to_string()))
            }
            "probe" if rest.starts_with(SPENT_PROBES) => Some(ObjectRole::SpentProbe),
            "probe" => Some(ObjectRole::Probe),
            _ => None,
        };
        role.unwrap_or(ObjectRole::Foreign)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::ObjectHash;

    #[test]
    fn every_name_is_recognised_again() {
        let names = CustomerNames::new(&CustomerName::new("acme").unwrap());
        let session = SessionId::from_bytes([0xab; 16]);
        let hash = ObjectHash::from_bytes([0xcd; 32]);
        let pack = PackName { session, hash };
        let segment = SegmentName { session, hash };
        let point = PointId::from_bytes([1; 16]);
        let entry = EntryHash::from_bytes([2; 32]);
        let expected = [
            (names.key(3), ObjectRole::Key(3)),
            (names.ledger(42), ObjectRole::Ledger(42)),
            (names.rival(42, &entry), ObjectRole::Rival(42, entry)),
            (names.pack(&pack), ObjectRole::Pack(pack)),
            (names.segment(&segment), ObjectRole::Segment(segment)),
            (names.point(&point), ObjectRole::Point(point)),
            (repository_file(), ObjectRole::Foreign),
            (
                ObjectName::new("customers/acme/probe/standing").unwrap(),
                ObjectRole::Probe,
            ),
            (
                ObjectName::new("customers/acme/probe/spent/0a").unwrap(),
                ObjectRole::SpentProbe,
            ),
            (
                ObjectName::new("customers/acme/key/01.age").unwrap(),
                ObjectRole::Foreign,
            ),
            (
                CustomerNames::new(&CustomerName::new("acme2").unwrap()).point(&point),
                ObjectRole::Foreign,
            ),
        ];
        for (name, role) in expected {
            assert_eq!(names.role(&name), role, "{name}");
        }
    }
}

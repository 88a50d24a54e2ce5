//! A state as bytes, so that a host need not make it of every entry at each opening.
//!
//! A cache and nothing else: it is a pure function of the entries, it is believed by the very program
//! that made it and no other, it stays on the host, every few days the entries that it was made of are read
//! again and held against their hashes, and every few weeks, and whenever a ledger is verified, it is made
//! anew from genesis all the same. Where an entry before it turns out damaged or gone, it is believed
//! however old it is, and the damage told: the hash of the last entry that it was made of, which the store
//! must still have, names all before.

use super::state::State;
use crate::model::{PointKind, PointState};
use crate::policy::Policy;
use serde::de::Error;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fmt::Display;
use std::str::FromStr;

impl State {
    /// `None` if it cannot be written: then there is no checkpoint.
    pub(super) fn to_checkpoint(&self) -> Option<Vec<u8>> {
        serde_json::to_vec(self).ok()
    }

    /// `None` if these are not the bytes of a state.
    pub(super) fn from_checkpoint(bytes: &[u8]) -> Option<State> {
        let mut state: State = serde_json::from_slice(bytes).ok()?;
        if let Some(terms) = &state.terms {
            state.policy = Some(Policy::parse(terms).ok()?);
        }
        Some(state)
    }
}

#[derive(Serialize, Deserialize)]
#[serde(remote = "PointKind")]
pub(super) enum KindText {
    Full,
    Incremental,
}

#[derive(Serialize, Deserialize)]
#[serde(remote = "PointState")]
pub(super) enum StateText {
    Live,
    Expired,
    Erased,
}

fn parse<T: FromStr<Err: Display>, E: Error>(text: &str) -> Result<T, E> {
    text.parse().map_err(E::custom)
}

/// A map whose keys have a text.
pub(super) mod keys {
    use super::*;

    pub fn serialize<K, V, S>(map: &BTreeMap<K, V>, to: S) -> Result<S::Ok, S::Error>
    where
        K: Display,
        V: Serialize,
        S: Serializer,
    {
        to.collect_map(map.iter().map(|(key, value)| (key.to_string(), value)))
    }

    pub fn deserialize<'de, K, V, D>(from: D) -> Result<BTreeMap<K, V>, D::Error>
    where
        K: FromStr<Err: Display> + Ord,
        V: Deserialize<'de>,
        D: Deserializer<'de>,
    {
        let map = BTreeMap::<Cow<str>, V>::deserialize(from)?;
        map.into_iter()
            .map(|(key, value)| Ok((parse(&key)?, value)))
            .collect()
    }
}

/// A map of maps whose keys have a text.
pub(super) mod nested {
    use super::*;

    pub fn serialize<A, B, V, S>(
        map: &BTreeMap<A, BTreeMap<B, V>>,
        to: S,
    ) -> Result<S::Ok, S::Error>
    where
        A: Display,
        B: Display,
        V: Serialize,
        S: Serializer,
    {
        let outer = map.iter().map(|(key, inner)| {
            let inner = inner.iter().map(|(key, value)| (key.to_string(), value));
            (key.to_string(), inner.collect::<BTreeMap<String, &V>>())
        });
        to.collect_map(outer)
    }

    pub fn deserialize<'de, A, B, V, D>(from: D) -> Result<BTreeMap<A, BTreeMap<B, V>>, D::Error>
    where
        A: FromStr<Err: Display> + Ord,
        B: FromStr<Err: Display> + Ord,
        V: Deserialize<'de>,
        D: Deserializer<'de>,
    {
        let map = BTreeMap::<Cow<str>, BTreeMap<Cow<str>, V>>::deserialize(from)?;
        map.into_iter()
            .map(|(key, inner)| {
                let inner = inner.into_iter();
                let inner = inner.map(|(key, value)| Ok((parse(&key)?, value)));
                Ok((parse(&key)?, inner.collect::<Result<_, _>>()?))
            })
            .collect()
    }
}

/// A collection of two things that have a text: a set of pairs, or a map.
pub(super) mod pairs {
    use super::*;

    pub trait Pair {
        fn texts(&self) -> (String, String);
    }

    impl<A: Display, B: Display> Pair for &(A, B) {
        fn texts(&self) -> (String, String) {
            (self.0.to_string(), self.1.to_string())
        }
    }

    impl<A: Display, B: Display> Pair for (&A, &B) {
        fn texts(&self) -> (String, String) {
            (self.0.to_string(), self.1.to_string())
        }
    }

    pub fn serialize<'a, L, S>(pairs: &'a L, to: S) -> Result<S::Ok, S::Error>
    where
        &'a L: IntoIterator<Item: Pair>,
        S: Serializer,
    {
        to.collect_seq(pairs.into_iter().map(|pair| pair.texts()))
    }

    pub fn deserialize<'de, A, B, L, D>(from: D) -> Result<L, D::Error>
    where
        A: FromStr<Err: Display>,
        B: FromStr<Err: Display>,
        L: FromIterator<(A, B)>,
        D: Deserializer<'de>,
    {
        let pairs = Vec::<(Cow<str>, Cow<str>)>::deserialize(from)?;
        pairs
            .iter()
            .map(|(one, other)| Ok((parse(one)?, parse(other)?)))
            .collect()
    }
}

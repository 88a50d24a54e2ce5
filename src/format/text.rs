//! Ids and names as text in JSON, by their `Display` and `FromStr`; `model` knows no serde.

use serde::{Deserialize, Deserializer, Serializer, de::Error};
use std::fmt::Display;
use std::str::FromStr;

pub fn serialize<T: Display, S: Serializer>(value: &T, to: S) -> Result<S::Ok, S::Error> {
    to.collect_str(value)
}

pub fn deserialize<'de, T, D>(from: D) -> Result<T, D::Error>
where
    T: FromStr<Err: Display>,
    D: Deserializer<'de>,
{
    let text = std::borrow::Cow::<str>::deserialize(from)?;
    text.parse().map_err(D::Error::custom)
}

pub mod option {
    use super::*;

    pub fn serialize<T: Display, S: Serializer>(
        value: &Option<T>,
        to: S,
    ) -> Result<S::Ok, S::Error> {
        match value {
            Some(value) => to.collect_str(value),
            None => to.serialize_none(),
        }
    }

    pub fn deserialize<'de, T, D>(from: D) -> Result<Option<T>, D::Error>
    where
        T: FromStr<Err: Display>,
        D: Deserializer<'de>,
    {
        Option::<String>::deserialize(from)?
            .map(|text| text.parse().map_err(D::Error::custom))
            .transpose()
    }
}

/// A collection of what has a text.
pub mod list {
    use super::*;

    pub fn serialize<'a, T, L, S>(values: &'a L, to: S) -> Result<S::Ok, S::Error>
    where
        T: Display + 'a,
        &'a L: IntoIterator<Item = &'a T>,
        S: Serializer,
    {
        to.collect_seq(values.into_iter().map(T::to_string))
    }

    pub fn deserialize<'de, T, L, D>(from: D) -> Result<L, D::Error>
    where
        T: FromStr<Err: Display>,
        L: FromIterator<T>,
        D: Deserializer<'de>,
    {
        Vec::<String>::deserialize(from)?
            .into_iter()
            .map(|text| text.parse().map_err(D::Error::custom))
            .collect()
    }
}

/// A time: UTC, whole seconds, `2026-11-21T22:00:00Z` and no other spelling.
pub mod time {
    use super::*;
    use jiff::Timestamp;

    pub fn serialize<S: Serializer>(time: &Timestamp, to: S) -> Result<S::Ok, S::Error> {
        match time.subsec_nanosecond() {
            0 => to.collect_str(time),
            _ => Err(serde::ser::Error::custom(format!(
                "{time} is not in whole seconds"
            ))),
        }
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Timestamp, D::Error> {
        parse(&String::deserialize(from)?)
    }

    pub(super) fn parse<E: Error>(text: &str) -> Result<Timestamp, E> {
        let time: Timestamp = text.parse().map_err(E::custom)?;
        match time.subsec_nanosecond() == 0 && time.to_string() == text {
            true => Ok(time),
            false => Err(E::custom("a time in UTC and whole seconds expected")),
        }
    }
}

pub mod time_option {
    use super::*;
    use jiff::Timestamp;

    pub fn serialize<S: Serializer>(time: &Option<Timestamp>, to: S) -> Result<S::Ok, S::Error> {
        match time {
            Some(time) => super::time::serialize(time, to),
            None => to.serialize_none(),
        }
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Option<Timestamp>, D::Error> {
        Option::<String>::deserialize(from)?
            .map(|text| super::time::parse(&text))
            .transpose()
    }
}

use std::borrow::Borrow;
use std::fmt;
use std::sync::Arc;

/// A name that may not be used, and why.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NameError {
    pub what: &'static str,
    pub name: String,
    pub reason: &'static str,
}

impl fmt::Display for NameError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let shown: String = self.name.chars().take(80).collect();
        write!(f, "{:?} is not a {}: {}", shown, self.what, self.reason)
    }
}

impl std::error::Error for NameError {}

/// Names become parts of object names and file names: no separators, no dot first, no control
/// characters, bounded.
fn check(what: &'static str, name: &str, max_bytes: usize) -> Result<(), NameError> {
    let error = |reason| {
        Err(NameError {
            what,
            name: name.to_string(),
            reason,
        })
    };
    if name.is_empty() {
        return error("it is empty");
    }
    if name.len() > max_bytes {
        return error("it is too long");
    }
    if name.contains('/') || name.contains('\\') {
        return error("it contains a path separator");
    }
    if name.starts_with(['.', '-']) {
        return error("it starts with a dot or a dash");
    }
    if !name
        .bytes()
        .all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'-' | b'_'))
    {
        return error("only letters, digits, '.', '-' and '_' are allowed");
    }
    Ok(())
}

macro_rules! checked_name {
    ($(#[$doc:meta])* $name:ident, $what:literal) => {
        $(#[$doc])*
        #[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(Arc<str>);

        impl $name {
            pub fn new(name: &str) -> Result<Self, NameError> {
                check($what, name, 64)?;
                Ok($name(name.into()))
            }

            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.pad(&self.0)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Debug::fmt(&self.0, f)
            }
        }

        impl std::str::FromStr for $name {
            type Err = NameError;

            fn from_str(name: &str) -> Result<Self, NameError> {
                Self::new(name)
            }
        }
    };
}

checked_name!(
    /// The configured name of a customer; the folder of its prefix.
    CustomerName, "customer name"
);
checked_name!(VmName, "VM name");
checked_name!(DiskName, "disk name");

/// The name of an object in a store: parts joined by `/`, relative, without `.` and `..`.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ObjectName(Arc<str>);

impl ObjectName {
    pub fn new(name: &str) -> Result<Self, NameError> {
        if name.len() > 512 {
            return Err(NameError {
                what: "object name",
                name: name.to_string(),
                reason: "it is longer than 512 characters",
            });
        }
        name.split('/')
            .try_for_each(|part| check("object name", part, 128))
            .map_err(|error| NameError {
                what: "object name",
                name: name.to_string(),
                reason: error.reason,
            })?;
        Ok(ObjectName(name.into()))
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// A map of names is searched for what need not be one.
impl Borrow<str> for ObjectName {
    fn borrow(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for ObjectName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

impl fmt::Debug for ObjectName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.0, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_is_not_a_vm_name() {
        for name in ["../web01", "a/b", "", ".", "..", "-x", "a b", "a\nb", "é"] {
            assert!(VmName::new(name).is_err(), "{name:?}");
        }
        assert!(VmName::new("web01.example-1_a").is_ok());
    }

    #[test]
    fn an_object_name_stays_below_its_root() {
        for name in ["/etc", "a//b", "a/../b", "a/./b", "", "a/", "a/.hidden"] {
            assert!(ObjectName::new(name).is_err(), "{name:?}");
        }
        let long = format!("packs/{}/{}", "0".repeat(32), "a".repeat(64));
        assert!(ObjectName::new(&long).is_ok());
        assert!(ObjectName::new(&"é".repeat(40)).is_err());
        assert!(ObjectName::new(&format!("a{}", "é".repeat(40))).is_err());
        assert!(ObjectName::new(&"a".repeat(129)).is_err());
    }
}

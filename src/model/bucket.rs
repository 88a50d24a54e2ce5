//! How a bucket is set up, as far as promises depend on it.

/// What deleting an object leaves.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Versioning {
    /// Nothing.
    #[default]
    Never,
    Enabled,
    /// It was enabled once: older versions may be there.
    Suspended,
}

/// Who can end a lock before its time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LockMode {
    /// Whoever has a right of its own for that; no key of vmkeep should have it.
    Governance,
    /// Nobody.
    Compliance,
}

impl LockMode {
    pub const fn as_str(self) -> &'static str {
        match self {
            LockMode::Governance => "governance",
            LockMode::Compliance => "compliance",
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct BucketFacts {
    pub versioning: Versioning,
    /// No version can be deleted without a person's code.
    pub needs_code_to_delete: bool,
    /// Objects can be locked, one by one.
    pub can_lock: bool,
    /// Days for which every new object is locked, unless said otherwise with it.
    pub default_lock_days: u32,
    /// Copies of every object are made elsewhere, and stay when it is deleted.
    pub is_replicated: bool,
    /// What the server itself does with objects as they age; rules that are switched off are not here.
    pub rules: Vec<LifecycleRule>,
    /// Where the server says that the bucket is.
    pub region: Option<String>,
}

/// What happens to all objects whose keys begin with `key_prefix`.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct LifecycleRule {
    pub name: String,
    pub key_prefix: String,
    /// Removed after so many days; 0 for a fixed date.
    pub expires_after_days: Option<u32>,
    /// Versions that are no longer the newest are removed after so many days.
    pub older_versions_after_days: Option<u32>,
    /// Moved where reading takes hours, to a class of this name.
    pub archived_in: Option<String>,
}

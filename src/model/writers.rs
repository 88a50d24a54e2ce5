use std::fmt;
use std::str::FromStr;

/// Who may write a repository.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Writers {
    /// Any host that is admitted: the store lets one of several win a name.
    #[default]
    Many,
    /// One host: the store would let a second writer overwrite what the first wrote.
    One,
}

impl fmt::Display for Writers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Writers::Many => "many",
            Writers::One => "one",
        })
    }
}

impl FromStr for Writers {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "many" => Ok(Writers::Many),
            "one" => Ok(Writers::One),
            _ => Err("is neither \"many\" nor \"one\""),
        }
    }
}

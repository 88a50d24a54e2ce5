//! A moment of some hosts and their bucket, to which a test comes back.

use super::super::host::{Host, path_text, tool};
use super::Bucket;

/// What was in the bucket and in the memory of its hosts. Each time it is taken up again it is below a prefix of
/// its own, so that nothing that is still on its way to the one before comes into it.
#[derive(Default)]
pub struct Replay {
    stored: Vec<(String, Vec<u8>)>,
    copies: usize,
}

fn prefix(copy: usize) -> String {
    format!("copy/{copy}")
}

impl Replay {
    /// Where the hosts begin.
    pub const FIRST_PREFIX: &str = "copy/0";

    /// How often it was taken up.
    pub fn copies(&self) -> usize {
        self.copies
    }

    /// From here on, every copy is what there is now.
    pub fn keep(&mut self, bucket: &Bucket, hosts: &[&Host]) {
        self.stored = bucket.content(&prefix(self.copies));
        for host in hosts {
            replace(&host.path("kept"), &host.state());
        }
    }

    /// The hosts find what was kept.
    pub fn rewind(&mut self, bucket: &Bucket, hosts: &[&Host]) {
        let from = format!("/{}\"", prefix(self.copies));
        self.copies += 1;
        let prefix = prefix(self.copies);
        for (place, bytes) in &self.stored {
            bucket.put(&format!("{prefix}/{place}"), bytes);
        }
        for host in hosts {
            let text = host.config_text();
            assert!(text.contains(&from));
            host.write_config(&text.replace(&from, &format!("/{prefix}\"")));
            replace(&host.state(), &host.path("kept"));
        }
    }
}

fn replace(folder: &std::path::Path, by: &std::path::Path) {
    tool("rm", &["-rf", path_text(folder)]);
    tool("cp", &["-a", path_text(by), path_text(folder)]);
}

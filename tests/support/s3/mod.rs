//! Real S3 servers on the loopback interface, and buckets in them.

mod kind;
mod proxy;
mod replay;
mod user;

pub use kind::{Condition, Kind};
pub use proxy::{Mishap, Passed, Proxy, Standstill};
pub use replay::Replay;
pub use user::{AGENT, KEEPER, OWNER, User, Visit};

use super::host::tool;
use super::live::{command_that_dies_with_us, spawn};
use super::project;
use aws_sdk_s3::Client;
use aws_sdk_s3::config::ResponseChecksumValidation;
use aws_sdk_s3::config::{BehaviorVersion, Credentials, Region, RequestChecksumCalculation};
use aws_sdk_s3::error::ProvideErrorMetadata;
use aws_sdk_s3::primitives::DateTime;
use aws_sdk_s3::types::{
    BucketLifecycleConfiguration, BucketVersioningStatus, DefaultRetention, ExpirationStatus,
    LifecycleExpiration, LifecycleRule, LifecycleRuleFilter, ObjectLockConfiguration,
    ObjectLockEnabled, ObjectLockRetention, ObjectLockRetentionMode, ObjectLockRule,
    VersioningConfiguration,
};
use rustix::fs::{FlockOperation, flock};
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::net::TcpListener;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;
use tempfile::TempDir;
use tokio::runtime::Runtime;
use vmkeep::model::Writers;
use vmkeep::storage::{S3, S3Credentials, S3Settings};

/// Of the form that Garage wants: the others take any.
pub const ACCESS_KEY_ID: &str = "GK766d6b65657074657374736b";
pub const SECRET_ACCESS_KEY: &str =
    "766d6b656570766d6b656570766d6b656570766d6b656570766d6b6565707465";

/// A server that lives as long as this program.
pub struct Server {
    pub kind: Kind,
    pub endpoint: String,
    /// The server itself, if `endpoint` is of a proxy.
    pub bare_endpoint: String,
    client: Client,
    runtime: Runtime,
    /// Killed by the kernel when this program ends, and all below it.
    _child: Child,
    folder: Folder,
}

/// The server that the tests run against, started by the first test that needs it.
pub fn server() -> &'static Server {
    static SERVER: OnceLock<Server> = OnceLock::new();
    SERVER.get_or_init(|| Server::start(Kind::chosen()))
}

impl Server {
    fn start(kind: Kind) -> Self {
        let folder = Folder::new();
        let ports: [u16; 3] = free_ports();
        let script = project().join("tests/support/s3");
        let mut command = command_that_dies_with_us("unshare");
        command
            .args(["--mount", "--propagation", "private", "--pid", "--fork"])
            .args(["--kill-child=KILL", "--mount-proc"])
            .arg(script.join(kind.gateway()))
            .arg(folder.path())
            .args([ACCESS_KEY_ID, SECRET_ACCESS_KEY])
            .args(ports.map(|port| port.to_string()))
            .args(kind.installed())
            .env(SERVER_FOLDER, folder.path())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(File::create(folder.path().join("script.err")).unwrap());
        let mut child = spawn(command).expect("unshare starts (util-linux)");
        let mut said = String::new();
        BufReader::new(child.stdout.take().unwrap())
            .read_line(&mut said)
            .unwrap();
        assert_eq!(
            said.trim(),
            "ready",
            "{kind:?} did not start (scripts/test or scripts/servers installs it); its logs are in {}",
            folder.path().display()
        );
        let [port, ..] = ports;
        let bare_endpoint = format!("http://127.0.0.1:{port}");
        let endpoint = match kind.is_behind_a_proxy() {
            true => Proxy::in_turn(&bare_endpoint).endpoint,
            false => bare_endpoint.clone(),
        };
        Server::new(kind, [endpoint, bare_endpoint], child, folder)
    }

    fn new(
        kind: Kind,
        [endpoint, bare_endpoint]: [String; 2],
        child: Child,
        folder: Folder,
    ) -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .unwrap();
        Server {
            kind,
            client: client(&endpoint, ACCESS_KEY_ID, SECRET_ACCESS_KEY),
            endpoint,
            bare_endpoint,
            runtime,
            _child: child,
            folder,
        }
    }

    /// `kill -9` of what answers requests, which is started anew.
    pub fn kill_gateway(&self) {
        let gateway = self.kind.gateway().as_bytes();
        let own = format!("{SERVER_FOLDER}={}", self.folder.path().display());
        for entry in fs::read_dir("/proc").unwrap() {
            let process = entry.unwrap().path();
            let environment = fs::read(process.join("environ")).unwrap_or_default();
            let is_own = environment
                .split(|byte| *byte == 0)
                .any(|one| one == own.as_bytes());
            // Not the script, whose program is the shell.
            let arguments = fs::read(process.join("cmdline")).unwrap_or_default();
            let program = arguments.split(|byte| *byte == 0).next();
            if is_own && program.is_some_and(|program| program.ends_with(gateway)) {
                let id = process.file_name().unwrap().to_str().unwrap();
                tool("kill", &["-9", id]);
            }
        }
    }

    /// The plain client.
    pub fn client(&self) -> &Client {
        &self.client
    }

    /// A new, empty bucket. Whether it keeps versions depends on the server.
    pub fn bucket(&'static self) -> Bucket {
        let bucket = self.next_bucket();
        let create = self.client.create_bucket().bucket(&bucket.name);
        self.runtime.block_on(create.send()).expect("a bucket");
        if self.kind.buckets_keep_versions() {
            bucket.keep_versions(BucketVersioningStatus::Enabled);
        }
        bucket
    }

    /// One with Object Lock, in which nothing is locked unless it is asked for.
    pub fn lockable_bucket(&'static self) -> Bucket {
        let bucket = self.next_bucket();
        let create = self.client.create_bucket().bucket(&bucket.name);
        let create = create.object_lock_enabled_for_bucket(true);
        self.runtime.block_on(create.send()).expect("a bucket");
        bucket
    }

    /// One that locks every new object for so many days.
    pub fn bucket_with_lock(&'static self, days: i32) -> Bucket {
        let bucket = self.lockable_bucket();
        let retention = DefaultRetention::builder()
            .mode(ObjectLockRetentionMode::Governance)
            .days(days);
        let rule = ObjectLockRule::builder().default_retention(retention.build());
        let configuration = ObjectLockConfiguration::builder()
            .object_lock_enabled(ObjectLockEnabled::Enabled)
            .rule(rule.build());
        let put = self.client.put_object_lock_configuration();
        let put = put
            .bucket(&bucket.name)
            .object_lock_configuration(configuration.build());
        self.runtime.block_on(put.send()).expect("a lock");
        bucket
    }

    fn next_bucket(&'static self) -> Bucket {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        Bucket {
            server: self,
            name: format!("test-{}-{number}", std::process::id()),
        }
    }
}

fn client(endpoint: &str, access_key_id: &str, secret_access_key: &str) -> Client {
    let credentials = Credentials::new(access_key_id, secret_access_key, None, None, "test");
    let config = aws_sdk_s3::config::Builder::new()
        .behavior_version(BehaviorVersion::latest())
        .endpoint_url(endpoint)
        .region(Region::new("us-east-1"))
        .force_path_style(true)
        .http_client(aws_smithy_http_client::Builder::new().build_http())
        .credentials_provider(credentials)
        .request_checksum_calculation(RequestChecksumCalculation::WhenRequired)
        .response_checksum_validation(ResponseChecksumValidation::WhenRequired)
        .build();
    Client::from_conf(config)
}

/// In the environment of every process of a server.
const SERVER_FOLDER: &str = "VMKEEP_TEST_SERVER";

/// What a server has on disk. Nobody is left to remove it when this program ends, so the next one does:
/// a folder whose lock can be had belongs to no living program.
struct Folder {
    folder: TempDir,
    _lock: File,
}

impl Folder {
    const PREFIX: &str = "vmkeep-s3-server.";

    fn new() -> Self {
        for entry in fs::read_dir(std::env::temp_dir()).unwrap().flatten() {
            let name = entry.file_name();
            if name
                .as_encoded_bytes()
                .starts_with(Folder::PREFIX.as_bytes())
            {
                let lock = File::open(entry.path().join("lock"));
                let is_free = lock.is_ok_and(|lock| {
                    flock(&lock, FlockOperation::NonBlockingLockExclusive).is_ok()
                });
                if is_free {
                    // Another program may be doing the same.
                    let _ = fs::remove_dir_all(entry.path());
                }
            }
        }
        let prefix = Folder::PREFIX;
        let folder = tempfile::Builder::new().prefix(prefix).tempdir().unwrap();
        // Locked before it has the name at which others look.
        let unnamed = folder.path().join("lock.new");
        let lock = File::create(&unnamed).unwrap();
        flock(&lock, FlockOperation::LockExclusive).unwrap();
        fs::rename(&unnamed, folder.path().join("lock")).unwrap();
        Folder {
            folder,
            _lock: lock,
        }
    }

    fn path(&self) -> &Path {
        self.folder.path()
    }
}

fn free_ports<const N: usize>() -> [u16; N] {
    // All at once, so that no port is given twice.
    let held: [TcpListener; N] =
        std::array::from_fn(|_| TcpListener::bind(("127.0.0.1", 0)).unwrap());
    held.map(|listener| listener.local_addr().unwrap().port())
}

/// A bucket of a test.
pub struct Bucket {
    pub server: &'static Server,
    pub name: String,
}

/// A version or a delete marker, as the server lists it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Version {
    pub key: String,
    pub id: String,
    pub is_marker: bool,
}

impl Bucket {
    /// What opens it, with all keys below `prefix`, as the program does for the writers that it can have.
    pub fn settings(&self, prefix: &str) -> S3Settings {
        S3Settings {
            bucket: self.name.clone(),
            prefix: prefix.to_string(),
            endpoint: Some(self.server.endpoint.clone()),
            region: "us-east-1".to_string(),
            path_style: true,
            ca_certificates: None,
            credentials: S3Credentials::Given {
                access_key_id: ACCESS_KEY_ID.to_string(),
                secret_access_key: SECRET_ACCESS_KEY.to_string().into(),
            },
            connections: 8,
            upload_bytes_per_second: None,
            download_bytes_per_second: None,
            part_bytes: 8 << 20,
            patience: Duration::from_secs(60),
            ask_first: self.server.kind.writers() == Writers::One,
            may_delete: true,
            lock: None,
        }
    }

    /// `[repository]` of a configuration, for the writers that it can have.
    pub fn config(&self, prefix: &str) -> String {
        self.config_for(self.server.kind.writers(), prefix)
    }

    pub fn config_for(&self, writers: Writers, prefix: &str) -> String {
        format!(
            "[repository]\nurl = \"s3://{}/{prefix}\"\nwriters = \"{writers}\"\n\
             [repository.s3]\nendpoint = \"{}\"\n\
             allow_http = true\naccess_key_id = \"{ACCESS_KEY_ID}\"\n\
             secret_access_key_command = [\"echo\", \"{SECRET_ACCESS_KEY}\"]\n",
            self.name, self.server.endpoint
        )
    }

    /// Brings everything below `prefix` into a folder, as a store in a directory has it; all versions.
    pub fn mirror(&self, prefix: &str, folder: &Path) {
        if folder.exists() {
            fs::remove_dir_all(folder).unwrap();
        }
        for version in self.versions() {
            let Some(place) = version.key.strip_prefix(&format!("{prefix}/")) else {
                continue;
            };
            if version.is_marker {
                continue;
            }
            let get = self.server.client.get_object().bucket(&self.name);
            let get = get.key(&version.key).version_id(&version.id).send();
            let bytes = self.server.runtime.block_on(async {
                let object = get.await.expect("an object");
                object.body.collect().await.expect("its bytes").into_bytes()
            });
            // Every version, each under a name of its own; the newest comes first.
            let mut file = folder.join(place);
            if file.exists() {
                file.as_mut_os_string().push(format!("@{}", version.id));
            }
            fs::create_dir_all(file.parent().unwrap()).unwrap();
            fs::write(file, bytes).unwrap();
        }
    }

    /// Has another client look for objects, versions, markers and uploads below a prefix: whether exactly
    /// these objects are there, and nothing with any of `gone` in its key. Tells what is wrong.
    pub fn independent_listing(
        &self,
        python: &Path,
        prefix: &str,
        keys: &[String],
        gone: &[String],
    ) -> Result<String, String> {
        let has_versions = self.server.kind.has_versions();
        let expected =
            serde_json::json!({ "keys": keys, "gone": gone, "has_versions": has_versions });
        let mut child = Command::new(python)
            .arg(project().join("tests/independent_listing.py"))
            .args([&self.server.endpoint, &self.name, prefix])
            .env("AWS_ACCESS_KEY_ID", ACCESS_KEY_ID)
            .env("AWS_SECRET_ACCESS_KEY", SECRET_ACCESS_KEY)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("the interpreter starts");
        let mut input = child.stdin.take().unwrap();
        input.write_all(expected.to_string().as_bytes()).unwrap();
        drop(input);
        let told = child.wait_with_output().unwrap();
        match told.status.success() {
            true => Ok(String::from_utf8_lossy(&told.stdout).trim().to_string()),
            false => Err(String::from_utf8_lossy(&told.stderr).into_owned()),
        }
    }

    /// Everything below `prefix`: what follows it in the key, and the bytes.
    pub fn content(&self, prefix: &str) -> Vec<(String, Vec<u8>)> {
        let prefix = format!("{prefix}/");
        let objects = self.objects().into_iter();
        let objects = objects.filter_map(|one| {
            let place = one.key.strip_prefix(&prefix)?.to_string();
            let get = self.server.client.get_object().bucket(&self.name);
            let get = get.key(one.key).send();
            let bytes = self.server.runtime.block_on(async {
                let object = get.await.expect("an object");
                object.body.collect().await.expect("its bytes").into_bytes()
            });
            Some((place, bytes.to_vec()))
        });
        objects.collect()
    }

    pub fn open(&self) -> S3 {
        S3::open(self.settings("root/of/vmkeep")).expect("the bucket opens")
    }

    pub fn keep_versions(&self, status: BucketVersioningStatus) {
        let configuration = VersioningConfiguration::builder().status(status).build();
        let put = self.server.client.put_bucket_versioning();
        let put = put
            .bucket(&self.name)
            .versioning_configuration(configuration);
        self.server
            .runtime
            .block_on(put.send())
            .expect("versioning");
    }

    /// That the server says it cannot.
    pub fn keeps_no_versions(&self) {
        let enabled = VersioningConfiguration::builder().status(BucketVersioningStatus::Enabled);
        let put = self.server.client.put_bucket_versioning();
        let put = put
            .bucket(&self.name)
            .versioning_configuration(enabled.build());
        let told = self.server.runtime.block_on(put.send());
        let error = told.expect_err("a server without versions");
        assert_eq!(error.code(), Some("NotImplemented"), "{error:?}");
    }

    /// That the server says it cannot.
    pub fn takes_no_lock(&self) {
        let put = self.server.client.put_object_lock_configuration();
        let told = self.server.runtime.block_on(put.bucket(&self.name).send());
        let error = told.expect_err("a server without locks");
        assert_eq!(error.code(), Some("NotImplemented"), "{error:?}");
    }

    pub fn put(&self, key: &str, data: &[u8]) {
        let put = self.server.client.put_object().bucket(&self.name).key(key);
        let put = put.body(data.to_vec().into());
        self.server.runtime.block_on(put.send()).expect("an object");
    }

    /// One lifecycle rule, in the place of what was there.
    pub fn expire_after(&self, name: &str, key_prefix: &str, days: i32) {
        let rule = LifecycleRule::builder()
            .id(name)
            .status(ExpirationStatus::Enabled)
            .filter(LifecycleRuleFilter::builder().prefix(key_prefix).build())
            .expiration(LifecycleExpiration::builder().days(days).build())
            .build()
            .unwrap();
        let configuration = BucketLifecycleConfiguration::builder().rules(rule);
        let put = self.server.client.put_bucket_lifecycle_configuration();
        let put = put
            .bucket(&self.name)
            .lifecycle_configuration(configuration.build().unwrap());
        self.server.runtime.block_on(put.send()).expect("a rule");
    }

    /// Deletes as one who knows nothing of versions does.
    pub fn delete(&self, key: &str) {
        let delete = self.server.client.delete_object().bucket(&self.name);
        self.server
            .runtime
            .block_on(delete.key(key).send())
            .expect("deleted");
    }

    /// Begins an upload in parts and leaves it.
    pub fn begin_upload(&self, key: &str) {
        let begin = self.server.client.create_multipart_upload();
        let begun = begin.bucket(&self.name).key(key);
        self.server.runtime.block_on(begun.send()).expect("begun");
    }

    /// Everything the server lists: keys with their versions.
    pub fn versions(&self) -> Vec<Version> {
        if !self.server.kind.has_versions() {
            return self.objects();
        }
        let mut found = Vec::new();
        let (mut key, mut id) = (None, None);
        loop {
            let list = self.server.client.list_object_versions();
            let list = list.bucket(&self.name).set_key_marker(key.take());
            let list = list.set_version_id_marker(id.take());
            let page = self
                .server
                .runtime
                .block_on(list.send())
                .expect("a listing");
            let version = |key: Option<&str>, id: Option<&str>, is_marker| Version {
                key: key.unwrap().to_string(),
                id: id.unwrap().to_string(),
                is_marker,
            };
            let data = page.versions().iter();
            let markers = page.delete_markers().iter();
            found.extend(data.map(|one| version(one.key(), one.version_id(), false)));
            found.extend(markers.map(|one| version(one.key(), one.version_id(), true)));
            if page.is_truncated() != Some(true) {
                return found;
            }
            key = page.next_key_marker().map(str::to_string);
            id = page.next_version_id_marker().map(str::to_string);
        }
    }

    /// The keys, each as its only version.
    fn objects(&self) -> Vec<Version> {
        let list = self.server.client.list_objects_v2().bucket(&self.name);
        let mut pages = list.into_paginator().send();
        self.server.runtime.block_on(async {
            let mut found = Vec::new();
            while let Some(page) = pages.next().await {
                let page = page.expect("a listing");
                found.extend(page.contents().iter().map(|one| Version {
                    key: one.key().unwrap().to_string(),
                    id: "null".to_string(),
                    is_marker: false,
                }));
            }
            found
        })
    }

    /// Makes a lock end at once, as the owner of the bucket can in governance mode. Tells when, in seconds.
    pub fn ends_lock(&self, version: &Version) -> i64 {
        // A time that has passed is refused, and so is none.
        let until = jiff::Timestamp::now().as_second() + 2;
        let put = self.server.client.put_object_retention();
        let put = put.bucket(&self.name).key(&version.key);
        let put = put
            .version_id(&version.id)
            .bypass_governance_retention(true);
        let retention = ObjectLockRetention::builder()
            .mode(ObjectLockRetentionMode::Governance)
            .retain_until_date(DateTime::from_secs(until));
        let sent = put.retention(retention.build()).send();
        self.server.runtime.block_on(sent).expect("a shorter lock");
        until
    }

    /// Keys, sorted: Garage tells them in no order.
    pub fn uploads(&self) -> Vec<String> {
        let list = self.server.client.list_multipart_uploads();
        let listed = self
            .server
            .runtime
            .block_on(list.bucket(&self.name).send())
            .expect("a listing");
        let uploads = listed.uploads().iter();
        let mut keys: Vec<String> = uploads
            .map(|upload| upload.key().unwrap().to_string())
            .collect();
        keys.sort();
        keys
    }
}

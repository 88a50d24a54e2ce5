//! Users who may do in a bucket only what its policy says.

use super::{Bucket, Version};
use aws_sdk_s3::Client;
use aws_sdk_s3::error::{ProvideErrorMetadata, SdkError};
use aws_sdk_s3::primitives::DateTime;
use aws_sdk_s3::types::{
    BucketCannedAcl, BucketLifecycleConfiguration, BucketVersioningStatus, Delete,
    ExpirationStatus, LifecycleExpiration, LifecycleRule, LifecycleRuleFilter, ObjectCannedAcl,
    ObjectIdentifier, ObjectLockConfiguration, ObjectLockEnabled, ObjectLockLegalHold,
    ObjectLockLegalHoldStatus, ObjectLockRetention, ObjectLockRetentionMode, Tag, Tagging,
    VersioningConfiguration,
};

use vmkeep::storage::{S3Credentials, S3Settings};

/// One that the server was started with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct User {
    pub name: &'static str,
    access_key_id: &'static str,
    secret_access_key: &'static str,
}

/// Whose the buckets are.
pub const OWNER: User = User {
    name: "owner",
    access_key_id: super::ACCESS_KEY_ID,
    secret_access_key: super::SECRET_ACCESS_KEY,
};

pub const AGENT: User = User {
    name: "agent",
    access_key_id: "VMKEEP-agent",
    secret_access_key: "vmkeep-agent-secret",
};

pub const KEEPER: User = User {
    name: "keeper",
    access_key_id: "VMKEEP-keeper",
    secret_access_key: "vmkeep-keeper-secret",
};

impl User {
    /// As a policy of this server names it.
    pub fn principal(&self) -> String {
        format!("arn:aws:iam:::user/{}", self.name)
    }
}

impl Bucket {
    pub fn apply_policy(&self, policy: &str) {
        let put = self.server.client.put_bucket_policy().bucket(&self.name);
        let put = put.policy(policy).send();
        self.server.runtime.block_on(put).expect("a policy");
    }

    /// As `config`, with the key of a user.
    pub fn config_of(&self, user: &User, prefix: &str) -> String {
        self.config(prefix)
            .replace(super::ACCESS_KEY_ID, user.access_key_id)
            .replace(super::SECRET_ACCESS_KEY, user.secret_access_key)
    }

    /// As `settings`, with the key of a user.
    pub fn settings_of(&self, user: &User, prefix: &str) -> S3Settings {
        S3Settings {
            credentials: S3Credentials::Given {
                access_key_id: user.access_key_id.to_string(),
                secret_access_key: user.secret_access_key.to_string().into(),
            },
            ..self.settings(prefix)
        }
    }

    pub fn visited_by(&self, user: &User) -> Visit<'_> {
        let endpoint = &self.server.endpoint;
        Visit {
            bucket: self,
            client: super::client(endpoint, user.access_key_id, user.secret_access_key),
        }
    }
}

/// What the server says to a refused request, such as `AccessDenied`.
pub type Told = Result<(), String>;

/// Requests that vmkeep does not make, with the key of a user.
pub struct Visit<'b> {
    bucket: &'b Bucket,
    client: Client,
}

impl Visit<'_> {
    fn told<T, E: ProvideErrorMetadata, R>(
        &self,
        request: impl Future<Output = Result<T, SdkError<E, R>>>,
    ) -> Told {
        match self.bucket.server.runtime.block_on(request) {
            Ok(_) => Ok(()),
            Err(error) => Err(error.code().unwrap_or("no code").to_string()),
        }
    }

    pub fn reads(&self, key: &str) -> Vec<u8> {
        let get = self.client.get_object().bucket(&self.bucket.name);
        let get = get.key(key).send();
        self.bucket.server.runtime.block_on(async {
            let object = get.await.expect("an object");
            object.body.collect().await.expect("its bytes").to_vec()
        })
    }

    /// Without a condition.
    pub fn puts(&self, key: &str, data: &[u8]) -> Told {
        let put = self.client.put_object().bucket(&self.bucket.name);
        self.told(put.key(key).body(data.to_vec().into()).send())
    }

    pub fn copies(&self, from: &str, to: &str) -> Told {
        let copy = self.client.copy_object().bucket(&self.bucket.name);
        let copy = copy.copy_source(format!("{}/{from}", self.bucket.name));
        self.told(copy.key(to).send())
    }

    pub fn deletes(&self, key: &str) -> Told {
        let delete = self.client.delete_object().bucket(&self.bucket.name);
        self.told(delete.key(key).send())
    }

    pub fn deletes_version(&self, key: &str, id: &str) -> Told {
        let delete = self.client.delete_object().bucket(&self.bucket.name);
        self.told(delete.key(key).version_id(id).send())
    }

    pub fn deletes_many(&self, keys: &[&str]) -> Told {
        let objects = keys.iter().map(|key| {
            let object = ObjectIdentifier::builder().key(*key);
            object.build().unwrap()
        });
        let delete = Delete::builder().set_objects(Some(objects.collect()));
        let many = self.client.delete_objects().bucket(&self.bucket.name);
        let told = many.delete(delete.build().unwrap()).send();
        match self.bucket.server.runtime.block_on(told) {
            // An answer that all is well can still say of each that it is not.
            Ok(answer) => match answer.errors().first() {
                Some(error) => Err(error.code().unwrap_or("no code").to_string()),
                None => Ok(()),
            },
            Err(error) => Err(error.code().unwrap_or("no code").to_string()),
        }
    }

    /// Until when a version is locked, in seconds.
    pub fn locked_until(&self, version: &Version) -> Option<i64> {
        let head = self.client.head_object().bucket(&self.bucket.name);
        let head = head.key(&version.key).version_id(&version.id).send();
        let told = self.bucket.server.runtime.block_on(head);
        let until = told.expect("an object").object_lock_retain_until_date;
        until.map(|until| until.secs())
    }

    /// In governance mode, so many seconds from now.
    pub fn locks_version(&self, key: &str, id: &str, seconds: i64, bypasses: bool) -> Told {
        let until = jiff::Timestamp::now().as_second() + seconds;
        let retention = ObjectLockRetention::builder()
            .mode(ObjectLockRetentionMode::Governance)
            .retain_until_date(DateTime::from_secs(until))
            .build();
        let put = self.client.put_object_retention().bucket(&self.bucket.name);
        let put = put.key(key).version_id(id).retention(retention);
        let bypass = bypasses.then_some(true);
        self.told(put.set_bypass_governance_retention(bypass).send())
    }

    pub fn holds_version(&self, key: &str, id: &str) -> Told {
        let hold = ObjectLockLegalHold::builder().status(ObjectLockLegalHoldStatus::On);
        let put = self
            .client
            .put_object_legal_hold()
            .bucket(&self.bucket.name);
        let put = put.key(key).version_id(id).legal_hold(hold.build());
        self.told(put.send())
    }

    /// Whether what is created is locked, and for how long.
    pub fn changes_the_default_lock(&self) -> Told {
        let configuration = ObjectLockConfiguration::builder()
            .object_lock_enabled(ObjectLockEnabled::Enabled)
            .build();
        let put = self.client.put_object_lock_configuration();
        let put = put.bucket(&self.bucket.name);
        self.told(put.object_lock_configuration(configuration).send())
    }

    /// Begins an upload in parts, puts one, and leaves it; its name.
    pub fn leaves_an_upload(&self, key: &str) -> String {
        let begin = self.client.create_multipart_upload();
        let begin = begin.bucket(&self.bucket.name).key(key).send();
        let part = self.client.upload_part().bucket(&self.bucket.name).key(key);
        self.bucket.server.runtime.block_on(async {
            let begun = begin.await.expect("begun");
            let id = begun.upload_id().unwrap().to_string();
            let part = part.upload_id(&id).part_number(1);
            part.body(vec![7; 100].into()).send().await.expect("a part");
            id
        })
    }

    pub fn aborts(&self, key: &str, upload: &str) -> Told {
        let abort = self.client.abort_multipart_upload();
        let abort = abort.bucket(&self.bucket.name).key(key);
        self.told(abort.upload_id(upload).send())
    }

    pub fn keeps_versions(&self, status: BucketVersioningStatus) -> Told {
        let configuration = VersioningConfiguration::builder().status(status).build();
        let put = self
            .client
            .put_bucket_versioning()
            .bucket(&self.bucket.name);
        self.told(put.versioning_configuration(configuration).send())
    }

    pub fn expires_everything(&self) -> Told {
        let rule = LifecycleRule::builder()
            .id("everything")
            .status(ExpirationStatus::Enabled)
            .filter(LifecycleRuleFilter::builder().prefix("").build())
            .expiration(LifecycleExpiration::builder().days(1).build())
            .build()
            .unwrap();
        let rules = BucketLifecycleConfiguration::builder().rules(rule);
        let put = self.client.put_bucket_lifecycle_configuration();
        let put = put.bucket(&self.bucket.name);
        self.told(put.lifecycle_configuration(rules.build().unwrap()).send())
    }

    pub fn removes_the_rules(&self) -> Told {
        let delete = self.client.delete_bucket_lifecycle();
        self.told(delete.bucket(&self.bucket.name).send())
    }

    pub fn puts_policy(&self, policy: &str) -> Told {
        let put = self.client.put_bucket_policy().bucket(&self.bucket.name);
        self.told(put.policy(policy).send())
    }

    pub fn removes_the_policy(&self) -> Told {
        let delete = self.client.delete_bucket_policy();
        self.told(delete.bucket(&self.bucket.name).send())
    }

    pub fn opens_the_bucket_to_all(&self) -> Told {
        let put = self.client.put_bucket_acl().bucket(&self.bucket.name);
        self.told(put.acl(BucketCannedAcl::PublicReadWrite).send())
    }

    pub fn opens_to_all(&self, key: &str) -> Told {
        let put = self.client.put_object_acl().bucket(&self.bucket.name);
        self.told(put.key(key).acl(ObjectCannedAcl::PublicRead).send())
    }

    pub fn tags(&self, key: &str) -> Told {
        let tag = Tag::builder().key("a").value("b").build().unwrap();
        let tagging = Tagging::builder().tag_set(tag).build().unwrap();
        let put = self.client.put_object_tagging().bucket(&self.bucket.name);
        self.told(put.key(key).tagging(tagging).send())
    }

    pub fn removes_the_bucket(&self) -> Told {
        let delete = self.client.delete_bucket();
        self.told(delete.bucket(&self.bucket.name).send())
    }
}

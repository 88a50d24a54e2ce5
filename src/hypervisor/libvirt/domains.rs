//! The domains that libvirt has: whether a new one can be added, and adding it.

use super::domain::is_uuid;
use super::new_domain::NewDomain;
use super::virsh::{Process, Virsh};
use super::xml::{self, shown};
use super::{QUERY_LIMIT, is_local, refused};
use crate::hypervisor::runtime_folder::check_passable;
use crate::hypervisor::{CaptureError, CaptureErrorKind};
use roxmltree::Node;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// libvirt asks the emulator anew what it can where it does not trust what it knows of it, and on
/// some hosts it does so a dozen times for one domain. No guest waits for it.
const DEFINE_LIMIT: Duration = Duration::from_secs(300);

/// libvirt on this host.
pub struct Domains {
    virsh: Box<dyn Virsh>,
}

impl Domains {
    pub fn new(uri: Option<String>, virsh: PathBuf) -> Result<Self, CaptureError> {
        if !is_local(uri.as_deref()) {
            return Err(CaptureError::new(
                CaptureErrorKind::Invalid,
                uri.unwrap_or_default(),
                "libvirt must be on this host: it is given the restored files",
            ));
        }
        Ok(Domains {
            virsh: Box::new(Process {
                program: virsh,
                uri,
            }),
        })
    }

    /// Refuses what another domain already is. Nothing is kept free: `define` asks again.
    pub fn check_free(&self, new: &NewDomain) -> Result<(), CaptureError> {
        let taken = |detail: String| {
            Err(CaptureError::new(
                CaptureErrorKind::Invalid,
                &new.name,
                detail,
            ))
        };
        if self.find("domuuid", new.name.as_str())?.is_some() {
            return taken("libvirt has a domain of this name already; choose another one".into());
        }
        let Some(uuid) = &new.kept_uuid else {
            return Ok(());
        };
        match self.find("domname", uuid)? {
            None => Ok(()),
            Some(other) => taken(format!(
                "the domain {} has the UUID {uuid} that it would keep; restore without \
                 --keep-identity, or first undefine that one",
                shown(&other)
            )),
        }
    }

    fn find(&self, question: &str, domain: &str) -> Result<Option<String>, CaptureError> {
        let reply = self.virsh.run(&[question, domain], QUERY_LIMIT)?;
        match (reply.success, reply.stderr.contains("failed to get domain")) {
            (true, _) => Ok(Some(reply.stdout.trim().to_string())),
            (false, true) => Ok(None),
            (false, false) => Err(CaptureError::new(
                CaptureErrorKind::Tool,
                domain,
                format!("libvirt does not tell its domains: {}", reply.complaint()),
            )),
        }
    }

    /// Why QEMU will not be able to open files in `folder`, as far as that can be known. libvirt
    /// gives it the files themselves.
    pub fn hindrance(&self, folder: &Path) -> Option<String> {
        let reply = self.virsh.run(&["capabilities"], QUERY_LIMIT).ok()?;
        let (user, group) = qemu_user(&reply.stdout)?;
        let error = check_passable(folder, user, group).err()?;
        Some(format!("the new domain will not start yet: {error}"))
    }

    /// Defines the domain that `file` holds; its UUID.
    pub fn define(&self, new: &NewDomain, file: &Path) -> Result<String, CaptureError> {
        let name = new.name.as_str();
        // A name that was taken meanwhile is not refused by libvirt when the UUID is the same.
        self.check_free(new)?;
        let path = file.to_str().unwrap_or_default();
        let reply = self
            .virsh
            .run(&["define", "--validate", path], DEFINE_LIMIT)?;
        if !reply.success {
            return Err(refused(name, "define it", &reply));
        }
        let uuid = self.find("domuuid", name)?.unwrap_or_default();
        match is_uuid(&uuid) {
            true => Ok(uuid),
            false => Err(CaptureError::new(
                CaptureErrorKind::Tool,
                name,
                "libvirt says that it is defined, and does not know it",
            )),
        }
    }
}

/// The user and group that QEMU runs as by default.
fn qemu_user(capabilities: &str) -> Option<(u32, u32)> {
    let document = xml::parse(capabilities).ok()?;
    let named = |node: &Node<'_, '_>, name: &str| node.has_tag_name(name);
    let model = document
        .descendants()
        .filter(|node| named(node, "secmodel"))
        .find(|model| {
            model
                .children()
                .any(|child| named(&child, "model") && child.text() == Some("dac"))
        })?;
    let label = model.children().find(|node| named(node, "baselabel"))?;
    super::domain::user_and_group(label.text()?)
}

#[cfg(test)]
mod tests {
    use super::super::testing::{Say, Script};
    use super::*;

    const UUID: &str = "af4a5c33-756e-430d-85fe-5b2e34bbe955";
    const NOBODY: &str = "error: failed to get domain 'new'";

    fn new(kept_uuid: Option<&str>) -> NewDomain {
        NewDomain {
            name: "new".parse().unwrap(),
            xml: String::new(),
            notes: Vec::new(),
            kept_uuid: kept_uuid.map(str::to_string),
        }
    }

    fn domains(answers: Vec<(&'static str, Say)>) -> Domains {
        Domains {
            virsh: Box::new(Script::new(answers)),
        }
    }

    #[test]
    fn a_name_or_a_kept_uuid_that_is_taken_is_refused() {
        let taken = domains(vec![("domuuid", Say::Yes(UUID))]);
        let error = taken.check_free(&new(None)).unwrap_err();
        assert!(error.detail.contains("of this name already"), "{error}");
        let taken = domains(vec![
            ("domuuid", Say::No(NOBODY)),
            ("domname", Say::Yes("web01\n")),
        ]);
        let error = taken.check_free(&new(Some(UUID))).unwrap_err();
        assert!(error.detail.contains("web01"), "{error}");
        let free = domains(vec![("domuuid", Say::No(NOBODY))]);
        free.check_free(&new(None)).unwrap();
    }

    #[test]
    fn a_libvirt_that_does_not_answer_is_not_taken_for_one_without_domains() {
        for say in [
            Say::No("error: failed to connect to the hypervisor"),
            Say::No(""),
            Say::Nothing,
        ] {
            assert!(
                domains(vec![("domuuid", say)])
                    .check_free(&new(None))
                    .is_err()
            );
        }
    }

    #[test]
    fn a_domain_is_defined_once_it_is_known_by_its_name() {
        let told = domains(vec![
            ("domuuid", Say::No(NOBODY)),
            ("define", Say::Yes("")),
            (
                "domuuid",
                Say::Yes("af4a5c33-756e-430d-85fe-5b2e34bbe955\n"),
            ),
        ]);
        assert_eq!(told.define(&new(None), Path::new("/x")).unwrap(), UUID);
        let refused = domains(vec![
            ("domuuid", Say::No(NOBODY)),
            ("define", Say::No("error: XML document failed to validate")),
        ]);
        let error = refused.define(&new(None), Path::new("/x")).unwrap_err();
        assert!(error.detail.contains("failed to validate"), "{error}");
        let lost = domains(vec![
            ("domuuid", Say::No(NOBODY)),
            ("define", Say::Yes("")),
            ("domuuid", Say::No(NOBODY)),
        ]);
        assert!(lost.define(&new(None), Path::new("/x")).is_err());
    }

    #[test]
    fn a_folder_that_qemu_cannot_pass_through_is_told() {
        use std::os::unix::fs::PermissionsExt;
        let capabilities = "<capabilities><host><secmodel><model>none</model></secmodel>\
             <secmodel><model>dac</model><baselabel type='kvm'>+64055:+107</baselabel></secmodel>\
             </host></capabilities>";
        let folder = tempfile::tempdir().unwrap();
        let told = |say| domains(vec![("capabilities", say)]).hindrance(folder.path());
        let mode = |mode| {
            let permissions = std::fs::Permissions::from_mode(mode);
            std::fs::set_permissions(folder.path(), permissions).unwrap();
        };
        mode(0o711);
        assert_eq!(told(Say::Yes(capabilities)), None);
        mode(0o700);
        let said = told(Say::Yes(capabilities)).unwrap();
        assert!(said.contains("64055") && said.contains("chmod"), "{said}");
        // What cannot be known is not told.
        assert_eq!(told(Say::Yes("<capabilities/>")), None);
        assert_eq!(told(Say::Nothing), None);
    }

    #[test]
    fn libvirt_of_another_host_is_refused() {
        let domains = |uri: &str| Domains::new(Some(uri.to_string()), "virsh".into());
        assert!(domains("qemu+ssh://other/system").is_err());
        assert!(domains("qemu+unix:///system").is_ok());
        assert!(domains("qemu:///system").is_ok());
    }
}

use super::*;

const UUID: &str = "af4a5c33-756e-430d-85fe-5b2e34bbe955";

/// A domain in which nothing can be shared.
fn domain(os: &str, devices: &str) -> String {
    format!(
        "<domain type='kvm'>\n  <name>web01</name>\n  <uuid>{UUID}</uuid>\n  \
         <memory unit='KiB'>1048576</memory>\n  <os><type arch='x86_64'>hvm</type>{os}</os>\n  \
         <devices>\n    <emulator>/usr/bin/qemu-system-x86_64</emulator>\n    \
         <disk type='file' device='disk'><driver name='qemu' type='qcow2' cache='none'/>\
         <source file='/v/web01.qcow2'/><target dev='vda' bus='virtio'/>\
         <serial>S1</serial><boot order='1'/></disk>\n{devices}\n  </devices>\n</domain>\n"
    )
}

fn disk(name: &str, path: &str, format: ImageFormat) -> RestoredDisk {
    RestoredDisk {
        name: DiskName::new(name).unwrap(),
        path: path.to_string(),
        format,
    }
}

fn vda() -> RestoredDisk {
    disk("vda", "/r/vda.raw", ImageFormat::Raw)
}

fn made(xml: &str, keep_identity: bool, restored: &[RestoredDisk]) -> NewDomain {
    told(xml, keep_identity, restored).unwrap()
}

fn told(
    xml: &str,
    keep_identity: bool,
    restored: &[RestoredDisk],
) -> Result<NewDomain, CaptureError> {
    let name = "new".parse().unwrap();
    let wish = Wish {
        name: &name,
        keep_identity,
        restored,
    };
    new_domain(xml.as_bytes(), &wish)
}

/// What becomes of devices beside a restored `vda`.
fn beside(devices: &str) -> NewDomain {
    made(&domain("", devices), false, &[vda()])
}

fn noted(new: &NewDomain, part: &str) -> bool {
    new.notes.iter().any(|note| note.contains(part))
}

#[track_caller]
fn has(new: &NewDomain, part: &str) {
    assert!(new.xml.contains(part), "{part} is not in {}", new.xml);
}

#[track_caller]
fn lacks(new: &NewDomain, part: &str) {
    assert!(!new.xml.contains(part), "{part} is in {}", new.xml);
}

#[test]
fn a_plain_domain_gets_its_name_and_disk_and_is_else_the_same() {
    let new = made(&domain("", ""), false, &[vda()]);
    assert_eq!(
        new.xml,
        "<domain type='kvm'>\n  \n  \n  \
         <memory unit='KiB'>1048576</memory>\n  <os><type arch='x86_64'>hvm</type></os>\n  \
         <devices>\n    <emulator>/usr/bin/qemu-system-x86_64</emulator>\n    \
         <disk type='file' device='disk'><driver name='qemu' type='raw' cache='none'/>\
         <target dev='vda' bus='virtio'/>\
         <serial>S1</serial><boot order='1'/><source file='/r/vda.raw'/></disk>\n\n  </devices>\n\
         <name>new</name></domain>\n"
    );
    assert_eq!(new.notes, Vec::<String>::new());
    assert_eq!(new.kept_uuid, None);
}

#[test]
fn with_its_identity_kept_only_name_disks_and_generation_change() {
    let mac = "<interface type='network'><mac address='52:54:00:11:22:33'/>\
               <source network='default'/><target dev='tap7'/></interface>\
               <hostdev mode='subsystem' type='usb'/>\
               <graphics type='vnc' port='5901' autoport='no'/>";
    let xml = domain("", mac).replace("<memory ", "<genid>x</genid><memory ");
    let new = made(&xml, true, &[vda()]);
    assert_eq!(new.kept_uuid.as_deref(), Some(UUID));
    has(&new, mac);
    has(&new, UUID);
    has(&new, "<genid/>");
    assert!(new.notes.is_empty(), "{:?}", new.notes);
}

#[test]
fn what_the_guest_is_known_by_on_a_network_is_new() {
    let new = beside(
        "<interface type='bridge'><mac address='52:54:00:11:22:33'/><source bridge='br0'/>\
         <target dev='vnet-web01'/><model type='virtio'/><virtualport type='openvswitch'>\
         <parameters interfaceid='09b11c53-8b5c-4eeb-8f00-d84eaa0aaa4f' profileid='p'/>\
         </virtualport></interface>",
    );
    for old in ["52:54", "vnet-web01", "interfaceid"] {
        lacks(&new, old);
    }
    for kept in ["bridge='br0'", "<model type='virtio'/>", "profileid='p'"] {
        has(&new, kept);
    }
}

#[test]
fn every_uuid_that_the_guest_sees_goes_with_the_identity() {
    let xml = domain("<smbios mode='sysinfo'/>", "").replace(
        "<memory ",
        &format!(
            "<hwuuid>{UUID}</hwuuid><genid>{UUID}</genid><sysinfo type='smbios'><system>\
             <entry name='manufacturer'>M</entry><entry name='uuid'>{UUID}</entry></system>\
             </sysinfo><memory "
        ),
    );
    let new = made(&xml, false, &[vda()]);
    lacks(&new, UUID);
    has(&new, "<genid/>");
    has(&new, "<entry name='manufacturer'>M</entry>");
}

#[test]
fn each_format_and_each_kind_of_source_becomes_a_restored_file() {
    let network = "<disk type='network' device='disk' rawio='no' sgio='filtered'>\
        <driver name='qemu' type='raw' cache='none'/><auth username='u'><secret type='ceph' uuid='x'/>\
        </auth><source protocol='rbd' name='pool/db'><host name='h' port='6789'/></source>\
        <target dev='vdb' bus='virtio'/><shareable/></disk>";
    let block =
        "<disk type='block' device='disk'><source dev='/dev/vg/x'/><target dev='vdc'/></disk>";
    let chain = "<disk type='file' snapshot='external'><driver type='qcow2' discard_no_unref='on'>\
        <metadata_cache><max_size unit='bytes'>1024</max_size></metadata_cache></driver>\
        <source file='/v/top'><encryption format='luks'/></source><backingStore type='file'>\
        <format type='qcow2'/><source file='/v/base'/><backingStore/></backingStore>\
        <mirror type='file'><source file='/v/m'/></mirror><target dev='vdd'/></disk>";
    let xml = domain("", &format!("{network}{block}{chain}"));
    for (format, name) in [(ImageFormat::Raw, "raw"), (ImageFormat::Qcow2, "qcow2")] {
        let restored: Vec<RestoredDisk> = ["vda", "vdb", "vdc", "vdd"]
            .iter()
            .map(|disk| self::disk(disk, &format!("/r/{disk}"), format))
            .collect();
        let new = made(&xml, false, &restored);
        for old in [
            "/v/",
            "rbd",
            "/dev/vg",
            "secret",
            "shareable",
            "backingStore",
            "mirror",
            "sgio",
            "luks",
        ] {
            lacks(&new, old);
        }
        for disk in ["vda", "vdb", "vdc", "vdd"] {
            has(&new, &format!("<source file='/r/{disk}'/>"));
        }
        assert_eq!(new.xml.matches(&format!("type='{name}'")).count(), 4);
        assert_eq!(
            new.xml.contains("metadata_cache"),
            format == ImageFormat::Qcow2
        );
        assert_eq!(
            new.xml.contains("discard_no_unref"),
            format == ImageFormat::Qcow2
        );
        assert_eq!(
            new.notes,
            ["the image of vdd was encrypted; the restored one is not"]
        );
    }
}

#[test]
fn disks_that_are_not_restored_are_left_out_and_said() {
    let new = beside(
        "<disk type='file' device='disk'><source file='/v/data'/><target dev='vdb'/></disk>\
         <disk type='file' device='disk'><source file='/v/ro'/><target dev='vdc'/><readonly/></disk>\
         <disk type='block' device='lun'><source dev='/dev/sdx'/><target dev='sda'/></disk>\
         <disk type='file'><source file='/v/none'/></disk>",
    );
    for old in ["/v/", "/dev/sdx"] {
        lacks(&new, old);
    }
    assert_eq!(
        new.notes,
        [
            "the disk vdb is left out: it is not restored",
            "the disk vdc is left out: it is not restored",
            "the disk sda is left out: it is not restored",
            "the disk without a name is left out: it is not restored",
        ]
    );
}

#[test]
fn a_restored_disk_that_the_definition_has_not_is_said() {
    let more = disk("vdz", "/r/vdz.raw", ImageFormat::Raw);
    let new = made(&domain("", ""), false, &[vda(), more.clone()]);
    assert!(noted(&new, "vdz is restored, but"), "{:?}", new.notes);
    let error = told(&domain("", ""), false, &[more]).unwrap_err();
    assert!(error.detail.contains("none of the restored"), "{error}");
}

#[test]
fn media_that_are_only_read_stay_and_others_do_not() {
    let new = beside(
        "<disk type='file' device='cdrom'><source file='/iso/a.iso'/><target dev='sda'/><readonly/>\
         </disk>\
         <disk type='file' device='cdrom'><target dev='sdb'/><readonly/></disk>\
         <disk type='block' device='cdrom'><source dev='/dev/sr0'/><target dev='sdc'/></disk>\
         <disk type='network' device='cdrom'><source protocol='https' name='x'/><target dev='sdd'/>\
         </disk>\
         <disk type='file' device='floppy'><source file='/f/w'/><target dev='fda'/></disk>\
         <disk type='file' device='floppy'><source file='/f/r'/><target dev='fdb'/><readonly/></disk>",
    );
    has(&new, "<source startupPolicy='optional' file='/iso/a.iso'/>");
    has(&new, "<source startupPolicy='optional' file='/f/r'/>");
    for old in [
        "/dev/sr0",
        "https",
        "/f/w",
        "type='network'",
        "type='block'",
    ] {
        lacks(&new, old);
    }
    assert_eq!(
        new.notes,
        [
            "the drive sdc is left empty",
            "the drive sdd is left empty",
            "the drive fda is left empty",
        ]
    );
}

#[test]
fn the_firmware_gets_its_restored_variables_or_fresh_ones() {
    let nvram = disk("nvram", "/r/nvram.raw", ImageFormat::Raw);
    let both = [vda(), nvram];
    let loader = "<loader readonly='yes' type='pflash'>/fw/CODE.fd</loader>";
    let new = made(
        &domain(
            &format!("{loader}<nvram template='/fw/VARS.fd'>/n/web01_VARS.fd</nvram>"),
            "",
        ),
        false,
        &both,
    );
    has(&new, "<nvram template='/fw/VARS.fd'>/r/nvram.raw</nvram>");
    assert!(new.notes.is_empty(), "{:?}", new.notes);

    let file = "<nvram type='file' format='qcow2'><source file='/n/a.qcow2'/></nvram>";
    let new = made(&domain(file, ""), true, &both);
    has(&new, "<nvram format='qcow2'>/r/nvram.raw</nvram>");

    // libvirt had chosen it when the domain started.
    let chosen = domain("", "").replace("<os>", "<os firmware='efi'>");
    has(
        &made(&chosen, false, &both),
        "<nvram>/r/nvram.raw</nvram></os>",
    );

    for (old, fresh) in [
        (
            "<nvram template='/fw/VARS.fd'>/n/web01_VARS.fd</nvram>",
            "<nvram template='/fw/VARS.fd'/>",
        ),
        ("<nvram>/n/web01_VARS.fd</nvram>", "hvm</type></os>"),
        (file, "hvm</type></os>"),
    ] {
        let new = made(&domain(old, ""), true, &[vda()]);
        has(&new, fresh);
        lacks(&new, "/n/");
        assert!(noted(&new, "fresh ones"), "{:?}", new.notes);
    }
}

#[test]
fn nothing_of_the_host_is_shared_that_could_be_written_or_taken() {
    for (device, told) in [
        (
            "<hostdev mode='subsystem' type='pci' managed='yes'/>",
            "a device of the host",
        ),
        (
            "<interface type='hostdev'><source/></interface>",
            "a network device of the host",
        ),
        (
            "<interface type='vdpa'><source dev='/dev/vhost-vdpa-0'/></interface>",
            "a network device",
        ),
        (
            "<interface type='vhostuser'><source path='/run/x'/></interface>",
            "behind a socket",
        ),
        (
            "<filesystem type='mount'><source dir='/srv'/></filesystem>",
            "a folder of the host",
        ),
        ("<shmem name='s'/>", "shared memory"),
        ("<lease><key>k</key></lease>", "a lease"),
        (
            "<memory model='nvdimm'><source><path>/x</path></source></memory>",
            "persistent memory",
        ),
        (
            "<input type='evdev'><source dev='/dev/input/event1'/></input>",
            "an input device",
        ),
        (
            "<redirdev bus='usb' type='tcp'><source/></redirdev>",
            "a redirected USB device",
        ),
        ("<smartcard mode='host'/>", "a smartcard"),
        (
            "<rng model='virtio'><backend model='egd' type='udp'/></rng>",
            "random number",
        ),
        (
            "<pstore backend='acpi-erst'><path>/x</path></pstore>",
            "pstore",
        ),
        (
            "<tpm><backend type='passthrough'><device path='/dev/tpm0'/></backend></tpm>",
            "a TPM",
        ),
    ] {
        let new = beside(device);
        let tag = device.split_inclusive('>').next().unwrap();
        lacks(&new, tag);
        assert!(noted(&new, told), "{device}: {:?}", new.notes);
        assert!(noted(&new, "--keep-identity"), "{device}: {:?}", new.notes);
        // And with its identity it has it again.
        has(&made(&domain("", device), true, &[vda()]), device);
    }
    let harmless = "<redirdev bus='usb' type='spicevmc'/><smartcard mode='passthrough' \
        type='spicevmc'/><memory model='dimm'><target/></memory><input type='tablet' bus='usb'/>\
        <rng model='virtio'><backend model='random'>/dev/urandom</backend></rng>";
    has(&beside(harmless), harmless);
}

#[test]
fn what_is_added_to_the_command_line_of_qemu_is_left_out() {
    let more = "<q:commandline xmlns:q='http://libvirt.org/schemas/domain/qemu/1.0'>\
                <q:arg value='-drive'/><q:arg value='file=/v/web01.qcow2'/></q:commandline>";
    let xml = domain("", "").replace("<memory ", &format!("{more}<memory "));
    let new = made(&xml, false, &[vda()]);
    lacks(&new, "/v/web01.qcow2");
    assert!(noted(&new, "command line is left out"), "{:?}", new.notes);
    let kept = made(&xml, true, &[vda()]);
    has(&kept, more);
    assert!(
        noted(&kept, "see that it names no disk"),
        "{:?}",
        kept.notes
    );
}

#[test]
fn sockets_files_and_ports_of_character_devices_are_new() {
    let new = beside(
        "<serial type='unix'><source mode='bind' path='/run/web01.tty'/><log file='/log/web01' \
         append='off'/><protocol type='raw'/><target port='0'/></serial>\
         <console type='tcp'><source mode='bind' host='0' service='4000'/><target type='serial'/>\
         </console>\
         <serial type='file'><source path='/log/web01.serial'/></serial>\
         <serial type='pty'><log file='/log/web01.pty'/><target port='1'/></serial>\
         <channel type='unix'><source mode='bind' \
         path='/var/lib/libvirt/qemu/channel/target/domain-1-web01/org.qemu.guest_agent.0'/>\
         <target type='virtio' name='org.qemu.guest_agent.0'/></channel>\
         <channel type='tcp'><source mode='connect' host='h' service='1'/>\
         <target type='virtio' name='x.y'/></channel>\
         <channel type='unix'><target type='virtio' name='plain'/></channel>\
         <channel type='spicevmc'><target type='virtio' name='com.redhat.spice.0'/></channel>",
    );
    for old in [
        "web01",
        "4000",
        "service",
        "<log",
        "<protocol",
        "type='tcp'",
        "type='file'><t",
    ] {
        lacks(&new, old);
    }
    has(&new, "<serial type='pty'><target port='0'/></serial>");
    has(
        &new,
        "<channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/></channel>",
    );
    has(
        &new,
        "<channel type='unix'><target type='virtio' name='x.y'/></channel>",
    );
    has(&new, "<channel type='spicevmc'>");
    assert_eq!(
        new.notes,
        [
            "its serial led to the host (unix); it is a terminal now (virsh console)",
            "its console led to the host (tcp); it is a terminal now (virsh console)",
            "its serial led to the host (file); it is a terminal now (virsh console)",
            "the channel org.qemu.guest_agent.0 gets a new socket",
            "the channel x.y gets a new socket",
        ]
    );
}

#[test]
fn fixed_ports_and_sockets_of_screens_are_chosen_anew() {
    let new = beside(
        "<graphics type='vnc' port='5901' autoport='no' websocket='5701' listen='0.0.0.0' \
         passwd='secret'><listen type='address' address='0.0.0.0'/></graphics>\
         <graphics type='spice' port='5902' tlsPort='5903' autoport='no'/>\
         <graphics type='vnc' socket='/run/web01.vnc'><listen type='socket' \
         socket='/run/web01.vnc'/></graphics>\
         <graphics type='vnc' socket='/run/web01.old'/>",
    );
    for old in ["590", "570", "/run/"] {
        lacks(&new, old);
    }
    has(&new, "passwd='secret'");
    has(&new, "websocket='-1'");
    // None of the two that had a socket listens to the network now.
    assert_eq!(new.xml.matches("<listen type='socket'").count(), 2);
    let automatic = "<graphics type='vnc' port='-1' autoport='yes' listen='127.0.0.1'/>";
    let new = beside(automatic);
    has(&new, automatic);
    assert!(new.notes.is_empty());
}

#[test]
fn a_tpm_and_a_vsock_are_the_new_domains_own() {
    let new = beside(
        "<tpm model='tpm-crb'><backend type='emulator' version='2.0'>\
         <source type='dir' path='/tpm/web01'/></backend></tpm>\
         <vsock model='virtio'><cid auto='no' address='42'/></vsock>",
    );
    lacks(&new, "/tpm/");
    lacks(&new, "42");
    has(&new, "<cid auto='yes' />");
    assert!(noted(&new, "it starts empty"), "{:?}", new.notes);
}

#[test]
fn paths_and_names_are_escaped() {
    let restored = disk("vda", "/r/a & b's \"<x>\".raw", ImageFormat::Raw);
    let name: DomainName = "a & <b>".parse().unwrap();
    let wish = Wish {
        name: &name,
        keep_identity: false,
        restored: std::slice::from_ref(&restored),
    };
    let new = new_domain(domain("", "").as_bytes(), &wish).unwrap();
    let document = xml::parse(&new.xml).unwrap();
    let said = document
        .descendants()
        .find(|node| node.has_tag_name("source"))
        .and_then(|source| source.attribute("file"));
    assert_eq!(said, Some(restored.path.as_str()));
    has(&new, "<name>a &amp; &lt;b&gt;</name>");
}

#[test]
fn hostile_definitions_are_refused_and_never_followed() {
    let refused = |xml: &str| told(xml, false, &[vda()]).unwrap_err().detail;
    assert!(refused("").contains("cannot be read"));
    assert!(refused("<volume/>").contains("not that of a domain"));
    assert!(refused("<x:domain xmlns:x='n'/>").contains("not that of a domain"));
    assert!(refused("<domain xmlns='n'><name>web01</name></domain>").contains("not that of"));
    assert!(refused("<domain/>").contains("none of the restored"));
    assert!(refused("<domain><devices/></domain>").contains("none of the restored"));
    let entity = format!("<!DOCTYPE d [<!ENTITY a '/etc/passwd'>]>{}", domain("", ""));
    assert!(refused(&entity).contains("cannot be read"));
    assert!(refused(&" ".repeat(xml::MAX_BYTES + 1)).contains("at most"));
    let many = domain("", &"<x/>".repeat(xml::MAX_NODES as usize + 1));
    assert!(refused(&many).contains("cannot be read"));
    let name = "new".parse().unwrap();
    let wish = Wish {
        name: &name,
        keep_identity: false,
        restored: &[vda()],
    };
    assert!(new_domain(b"\xff\xfe<domain/>", &wish).is_err());
}

#[test]
fn what_stands_twice_cannot_bring_an_old_image_back() {
    let twice = "<disk type='file' device='disk'><driver type='raw'/><driver type='qcow2'/>\
        <source file='/v/one'/><source file='/v/two'/><target dev='vdb'/><target dev='vda'/></disk>\
        <disk type='file'><source file='/v/again'/><target dev='vda'/></disk>\
        <disk type='file' device='cdrom'><source file='/v/i'/><source file='/v/j'/>\
        <target dev='sda'/></disk>";
    let xml = domain("<nvram>/v/n1</nvram><nvram>/v/n2</nvram>", twice).replace(
        "</domain>",
        "<name>again</name><uuid>x</uuid><os><nvram>/v/n3</nvram></os><devices><disk>\
         <source file='/v/more'/><target dev='vdq'/></disk></devices></domain>",
    );
    let vdb = disk("vdb", "/r/vdb.raw", ImageFormat::Raw);
    let nvram = disk("nvram", "/r/nvram.raw", ImageFormat::Raw);
    let new = made(&xml, false, &[vda(), vdb, nvram]);
    for old in ["/v/", "again", "<uuid>"] {
        lacks(&new, old);
    }
    assert_eq!(new.xml.matches("/r/vda.raw").count(), 1);
    assert_eq!(new.xml.matches("/r/nvram.raw").count(), 1);
}

#[test]
fn elements_of_other_namespaces_and_comments_are_left_alone() {
    let other = "<x:disk xmlns:x='n'><x:source file='/v/x'/></x:disk><!-- <disk/> --><?p <disk/>?>";
    let new = beside(other);
    has(&new, other);
    let metadata =
        "<metadata><a:instance xmlns:a='n'><a:name>web01</a:name></a:instance></metadata>";
    let xml = domain("", "").replace("<memory ", &format!("{metadata}<memory "));
    has(&made(&xml, false, &[vda()]), metadata);
}

#[test]
fn only_names_that_libvirt_takes_for_names_are_names() {
    for good in ["web01", "web01-test", "web 01", "ü", "a.b_c+d", "1a"] {
        assert!(good.parse::<DomainName>().is_ok(), "{good}");
    }
    for bad in [
        "",
        "-x",
        ".x",
        "7",
        "a/b",
        "a\nb",
        " a",
        "a ",
        UUID,
        &"x".repeat(201),
    ] {
        assert!(bad.parse::<DomainName>().is_err(), "{bad}");
    }
}

#[test]
fn a_result_that_would_write_elsewhere_is_not_given_away() {
    let name = "new".parse().unwrap();
    let wish = Wish {
        name: &name,
        keep_identity: false,
        restored: &[vda()],
    };
    let refused = |devices: &str| {
        let xml = format!("<domain><name>new</name>{devices}</domain>");
        check::check(&xml, &wish).unwrap_err()
    };
    let disk = |inner: &str| {
        refused(&format!(
            "<devices><disk type='file'>{inner}</disk></devices>"
        ))
    };
    assert!(disk("<source file='/v/x'/><driver type='raw'/>").contains("not be a restored one"));
    assert!(disk("<source file='/r/vda.raw'/><driver type='qcow2'/>").contains("another format"));
    assert!(disk("<source file='/r/vda.raw'/>").contains("not be a restored one"));
    let good = "<disk type='file'><source file='/r/vda.raw'/><driver type='raw'/></disk>";
    assert!(refused(&format!("<devices>{good}{good}</devices>")).contains("the same file"));
    assert!(refused("<os><nvram>/n/x</nvram></os>").contains("firmware"));
    assert!(refused("<uuid>x</uuid>").contains("UUID"));
    assert!(refused("<name>new</name>").contains("name"));
}

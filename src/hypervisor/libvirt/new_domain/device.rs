//! Devices other than disks: what they have on the host, and what the guest is known by.

use super::Making;
use super::edits::{child, children, value};
use roxmltree::Node;

/// Ways of a character device that lead to a file, a socket, a port or a device of the host. QEMU
/// replaces a socket that another one listens at, and a log that another one writes.
const WAYS_OF_THE_HOST: &[&str] = &["unix", "tcp", "udp", "file", "pipe", "dev", "nmdm"];

impl Making<'_, '_> {
    pub(super) fn device(&mut self, device: Node<'_, '_>) {
        if device.tag_name().namespace().is_some() {
            return;
        }
        let name = device.tag_name().name();
        if name == "tpm" {
            self.note("the content of its TPM is in no restore point: it starts empty");
        }
        if self.wish.keep_identity {
            return;
        }
        match name {
            "interface" => self.interface(device),
            "serial" | "parallel" | "console" | "channel" => self.character(device, name),
            "graphics" => self.graphics(device),
            "tpm" => self.tpm(device),
            "vsock" => children(device, "cid").for_each(|cid| {
                self.edits.set_attribute(cid, "auto", "yes");
                self.edits.remove_attribute(cid, "address");
            }),
            "hostdev" => self.take_out(device, "a device of the host"),
            "filesystem" => self.take_out(device, "a folder of the host"),
            "shmem" => self.take_out(device, "shared memory"),
            "lease" => self.take_out(device, "a lease"),
            "pstore" => self.take_out(device, "the file of its pstore"),
            "memory" if matches!(value(device, "model"), "nvdimm" | "virtio-pmem") => {
                self.take_out(device, "the file of a persistent memory");
            }
            "input" if matches!(value(device, "type"), "evdev" | "passthrough") => {
                self.take_out(device, "an input device of the host");
            }
            "redirdev" if WAYS_OF_THE_HOST.contains(&value(device, "type")) => {
                self.take_out(device, "a redirected USB device");
            }
            "smartcard"
                if value(device, "mode") != "passthrough"
                    || WAYS_OF_THE_HOST.contains(&value(device, "type")) =>
            {
                self.take_out(device, "a smartcard of the host");
            }
            "rng"
                if children(device, "backend").any(|backend| value(backend, "model") == "egd") =>
            {
                self.take_out(device, "a random number generator behind a socket");
            }
            _ => {}
        }
    }

    fn interface(&mut self, interface: Node<'_, '_>) {
        match value(interface, "type") {
            "hostdev" | "vdpa" => self.take_out(interface, "a network device of the host"),
            "vhostuser" => self.take_out(interface, "a network device behind a socket"),
            _ => {
                for known_by in ["mac", "target"] {
                    self.edits.remove_children(interface, known_by);
                }
                for parameters in
                    children(interface, "virtualport").flat_map(|port| children(port, "parameters"))
                {
                    for id in ["interfaceid", "instanceid"] {
                        self.edits.remove_attribute(parameters, id);
                    }
                }
            }
        }
    }

    /// The guest keeps the device; the host's end of it is a new one.
    fn character(&mut self, device: Node<'_, '_>, kind: &str) {
        self.edits.remove_children(device, "log");
        let way = value(device, "type");
        if !WAYS_OF_THE_HOST.contains(&way) {
            return;
        }
        let is_virtio = children(device, "target").any(|target| value(target, "type") == "virtio");
        let sources = children(device, "source").count();
        for end in ["source", "protocol"] {
            self.edits.remove_children(device, end);
        }
        if kind == "channel" && is_virtio {
            // Without a path, libvirt makes one from the new name.
            self.edits.set_attribute(device, "type", "unix");
            if sources == 0 {
                return;
            }
            let name = child(device, "target").map_or("", |target| value(target, "name"));
            let name: String = name.chars().filter(|letter| !letter.is_control()).collect();
            self.note(format!("the channel {name} gets a new socket"));
        } else {
            self.edits.set_attribute(device, "type", "pty");
            self.note(format!(
                "its {kind} led to the host ({way}); it is a terminal now (virsh console)"
            ));
        }
    }

    fn graphics(&mut self, graphics: Node<'_, '_>) {
        let has_port = ["port", "tlsPort", "websocket"]
            .iter()
            .any(|name| !matches!(value(graphics, name), "" | "-1" | "0"));
        if has_port {
            self.note(format!(
                "its {} server gets another port",
                value(graphics, "type")
            ));
            self.edits.set_attribute(graphics, "port", "-1");
            self.edits.set_attribute(graphics, "autoport", "yes");
            self.edits.remove_attribute(graphics, "tlsPort");
            if !value(graphics, "websocket").is_empty() {
                self.edits.set_attribute(graphics, "websocket", "-1");
            }
        }
        let listens = children(graphics, "listen").collect::<Vec<_>>();
        // Without any of the two it would listen to the network.
        if !value(graphics, "socket").is_empty() && listens.is_empty() {
            self.edits.insert_into(graphics, "<listen type='socket'/>");
        }
        self.edits.remove_attribute(graphics, "socket");
        for listen in listens {
            self.edits.remove_attribute(listen, "socket");
        }
    }

    fn tpm(&mut self, tpm: Node<'_, '_>) {
        let backends = || children(tpm, "backend");
        if backends().any(|backend| value(backend, "type") != "emulator") {
            return self.take_out(tpm, "a TPM of the host");
        }
        backends().for_each(|backend| self.edits.remove_children(backend, "source"));
    }
}

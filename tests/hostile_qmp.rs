//! One VM's QEMU that gets stuck while its guest stands still: the shipped program gives this VM up
//! in time, its guard lets the guest go on, and the other VMs are backed up.

use vmkeep_test_support as support;

use serde_json::{Value, json};
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::{Arc, Mutex};
use support::{Host, HostOptions, path_text, time};

/// A monitor that gets stuck in a transaction, and a guest that is paused and let go.
struct StuckQemu {
    commands: Arc<Mutex<Vec<String>>>,
}

impl StuckQemu {
    fn listen(socket: &Path) -> Self {
        let listener = UnixListener::bind(socket).unwrap();
        let commands = Arc::new(Mutex::new(Vec::new()));
        let qemu = StuckQemu {
            commands: commands.clone(),
        };
        std::thread::spawn(move || {
            let mut paused = false;
            for stream in listener.incoming() {
                // A client that hangs up is followed by the next one.
                let _ = serve(stream.unwrap(), &commands, &mut paused);
            }
        });
        qemu
    }

    fn commands(&self) -> Vec<String> {
        self.commands.lock().unwrap().clone()
    }
}

fn serve(
    mut stream: UnixStream,
    commands: &Mutex<Vec<String>>,
    paused: &mut bool,
) -> std::io::Result<()> {
    stream.write_all(b"{\"QMP\": {}}\n")?;
    let lines = BufReader::new(stream.try_clone()?).lines();
    for line in lines {
        let message: Value = serde_json::from_str(&line?).unwrap();
        let command = message["execute"].as_str().unwrap().to_string();
        commands.lock().unwrap().push(command.clone());
        let status = match paused {
            true => "paused",
            false => "running",
        };
        let answer = match &*command {
            "query-status" => json!({"status": status}),
            "query-block" => json!([{
                "device": "", "removable": false, "inserted": {"node-name": "d0"},
                "qdev": "/machine/peripheral/vd0/virtio-backend",
            }]),
            "query-named-block-nodes" => json!([{
                "node-name": "d0", "drv": "raw", "file": "/srv/vd0", "ro": false,
                "image": {"virtual-size": 1 << 20},
            }]),
            "query-block-exports" | "query-jobs" | "query-iothreads" => json!([]),
            "qom-get" => match message["arguments"]["property"].as_str() {
                Some("type") => json!("virtio-blk-device"),
                _ => json!(false),
            },
            "transaction" => {
                stream.read_to_end(&mut Vec::new())?;
                return Ok(());
            }
            _ => {
                *paused = (*paused || command == "stop") && command != "cont";
                json!({})
            }
        };
        let reply = json!({"return": answer, "id": message["id"]});
        stream.write_all(format!("{reply}\n").as_bytes())?;
    }
    Ok(())
}

#[test]
fn a_qemu_that_is_stuck_while_its_guest_is_paused_spoils_no_other_vm() {
    let host = Host::new(&HostOptions::default());
    fs::write(host.image("web01", "vda"), vec![7; 300_000]).unwrap();
    let socket = host.path("stuck.qmp");
    let qemu = StuckQemu::listen(&socket);
    let vm = format!(
        "\n[[customer.vm]]\nname = \"stuck01\"\nqmp = \"{}\"\n",
        path_text(&socket)
    );
    let config = host.config_text();
    let overlays = host.path("overlays");
    let own = format!(
        "[host]\nfreeze_limit = \"2s\"\noverlay_dir = \"{}\"\n",
        path_text(&overlays)
    );
    let config = config.replacen("[host]\n", &own, 1);
    host.write_config(&(config + &vm));
    let now = time("2031-02-10T23:00:00Z");
    host.vmkeep(&["init", "--yes"], now).exits(0);

    let ran = host.vmkeep(&["backup", "stuck01", "web01"], now);

    assert!(!ran.was_killed(), "the guard killed the agent");
    ran.exits(3).says("stuck01").says("did not answer in time");
    let points = host.points(now);
    assert_eq!(points.len(), 1, "{points:?}");
    assert_eq!(points[0]["vm"], "web01");
    // By the guard, before the capture was cleaned up.
    let commands = qemu.commands();
    let at = |name: &str| commands.iter().rposition(|command| command == name);
    assert!(at("stop") < at("cont"), "{commands:?}");
    assert_eq!(at("stop"), at("transaction").map(|at| at - 1));
    let left: Vec<_> = fs::read_dir(overlays).unwrap().collect();
    assert!(left.is_empty(), "{left:?}");
}

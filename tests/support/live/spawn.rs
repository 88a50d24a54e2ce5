use std::io;
use std::process::{Child, Command};
use std::sync::mpsc::{self, Sender};
use std::sync::{Mutex, OnceLock};
use std::thread;

type Order = (Command, Sender<io::Result<Child>>);

/// A command whose process is killed when this program ends, however it ends: nothing is dropped
/// after a `kill -9`, nor what is in a `static`.
pub fn command_that_dies_with_us(program: &str) -> Command {
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL", "--", program]);
    command
}

/// Starts a command from a thread that lives as long as this program: the kernel takes the end of
/// the thread that started a process for the end of its parent.
pub fn spawn(command: Command) -> io::Result<Child> {
    static ORDERS: OnceLock<Mutex<Sender<Order>>> = OnceLock::new();
    let orders = ORDERS.get_or_init(|| {
        let (orders, received) = mpsc::channel::<Order>();
        thread::spawn(move || {
            for (mut command, answer) in received {
                let _ = answer.send(command.spawn());
            }
        });
        Mutex::new(orders)
    });
    let (answer, answered) = mpsc::channel();
    orders.lock().unwrap().send((command, answer)).unwrap();
    answered.recv().unwrap()
}

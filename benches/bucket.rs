//! What the store makes of a bucket, beside the plain client with the same objects, as many at once, on
//! the same server; and a whole backup and a whole restore of an image of files of this system, beside the plain
//! client with the objects that the backup made: `cargo bench --bench bucket`.
//! `VMKEEP_BENCH_ROUNDS` (3), `VMKEEP_BENCH_OBJECTS` (32), `VMKEEP_BENCH_MIB` (512).
//!
//! Ratios of alternating rounds: how fast a server on the same machine is says nothing of others. A backup also
//! hashes, compresses and seals, on the processors that the server runs on; what that takes by itself shows the
//! same backup into a directory, which is printed beside it.

use vmkeep_test_support as support;

use aws_sdk_s3::Client;
use aws_sdk_s3::primitives::ByteStream;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;
use support::s3::{Bucket, server};
use support::{Host, HostOptions, time};
use tokio::runtime::Runtime;
use vmkeep::model::ObjectName;
use vmkeep::storage::Storage;

const OBJECT_BYTES: usize = 16 << 20;
const AT_ONCE: usize = 8;

fn number_of(variable: &str, otherwise: usize) -> usize {
    std::env::var(variable).map_or(otherwise, |text| text.parse().expect("a number"))
}

/// MiB a second.
fn rate(objects: usize, work: impl FnOnce()) -> f64 {
    let started = Instant::now();
    work();
    (objects * OBJECT_BYTES) as f64 / f64::from(1 << 20) / started.elapsed().as_secs_f64()
}

fn each(objects: usize, work: impl Fn(usize) + Sync) {
    let next = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for _ in 0..AT_ONCE {
            scope.spawn(|| {
                loop {
                    match next.fetch_add(1, Ordering::Relaxed) {
                        number if number < objects => work(number),
                        _ => return,
                    }
                }
            });
        }
    });
}

async fn each_plainly<F: Future<Output = ()> + Send + 'static>(
    objects: usize,
    work: impl Fn(usize) -> F,
) {
    let permits = Arc::new(tokio::sync::Semaphore::new(AT_ONCE));
    let mut running = Vec::new();
    for number in 0..objects {
        let permit = permits.clone().acquire_owned().await.expect("never closed");
        let work = work(number);
        running.push(tokio::spawn(async move {
            work.await;
            drop(permit);
        }));
    }
    for one in running {
        one.await.expect("done");
    }
}

fn upload_plainly(
    runtime: &Runtime,
    client: &Client,
    bucket: &Bucket,
    data: &Arc<Vec<u8>>,
    objects: usize,
    round: usize,
) {
    runtime.block_on(each_plainly(objects, |number| {
        let put = client.put_object().bucket(&bucket.name);
        let put = put
            .key(format!("plain/{round}/{number}"))
            .if_none_match("*");
        let sent = put.body(ByteStream::from(data.to_vec())).send();
        async move { drop(sent.await.expect("uploaded")) }
    }));
}

fn download_plainly(
    runtime: &Runtime,
    client: &Client,
    bucket: &Bucket,
    objects: usize,
    round: usize,
) {
    runtime.block_on(each_plainly(objects, |number| {
        let get = client.get_object().bucket(&bucket.name);
        let sent = get.key(format!("plain/{round}/{number}")).send();
        async move {
            let object = sent.await.expect("an object");
            let bytes = object.body.collect().await.expect("its bytes").into_bytes();
            assert_eq!(bytes.len(), OBJECT_BYTES);
        }
    }));
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(0.0)
}

/// Files of this system, one after the other, with holes between: programs, libraries, text.
fn write_image(image: &mut File, bytes: &mut u64, folder: &Path) {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let mut paths: Vec<PathBuf> = entries.map(|entry| entry.path()).collect();
    paths.sort();
    for path in paths {
        if *bytes == 0 {
            return;
        }
        if path.is_symlink() {
            continue;
        } else if path.is_dir() {
            write_image(image, bytes, &path);
        } else if let Ok(file) = File::open(&path) {
            let mut content = Vec::new();
            if file.take(*bytes).read_to_end(&mut content).is_ok() {
                *bytes -= content.len() as u64;
                // To the next block, as a file system has it.
                content.resize(content.len().next_multiple_of(4096), 0);
                image.write_all(&content).expect("the image is written");
            }
        }
    }
}

fn seconds(work: impl FnOnce()) -> f64 {
    let started = Instant::now();
    work();
    started.elapsed().as_secs_f64()
}

fn whole(runtime: &Runtime, rounds: usize, mib: u64) {
    let folder = tempfile::tempdir().expect("a folder");
    let image = folder.path().join("image");
    let mut file = File::create(&image).expect("an image");
    let mut left = mib << 20;
    write_image(&mut file, &mut left, Path::new("/usr"));
    file.set_len(file.metadata().expect("its size").len() + (256 << 20))
        .expect("and a hole");
    let at = time("2031-02-10T23:00:00Z");
    let backup = |bucket: Option<String>| {
        let host = Host::new(&HostOptions {
            bucket,
            ..HostOptions::default()
        });
        fs::copy(&image, host.image("web01", "vda")).expect("a copy");
        host.vmkeep(&["init", "--yes"], at).exits(0);
        let took = seconds(|| {
            host.vmkeep(&["backup", "web01"], at).exits(0);
        });
        (host, took)
    };
    let mut restored = 0;
    let mut restore = |host: &Host| {
        restored += 1;
        let to = folder.path().join(format!("restored-{restored}"));
        let text = to.to_str().expect("a plain name");
        let took = seconds(|| {
            let words = ["restore", "web01", "--at", "latest", "--to", text];
            host.vmkeep(&words, at).exits(0);
        });
        let bytes = fs::read(to.join("vda.raw")).expect("the image");
        assert!(bytes == fs::read(host.image("web01", "vda")).expect("the image"));
        fs::remove_dir_all(to).expect("removed");
        took
    };
    println!("\na whole image with {mib} MiB of files, seconds");
    println!("(plain client, vmkeep, ratio of rates; vmkeep into a directory)");
    let (mut up, mut down) = (Vec::new(), Vec::new());
    for _ in 0..rounds {
        let bucket = server().bucket();
        let (host, own) = backup(Some(bucket.config("whole")));
        let own_down = restore(&host);
        let packs: Vec<(String, Arc<Vec<u8>>)> = bucket
            .content("whole")
            .into_iter()
            .filter(|(key, _)| key.contains("/packs/"))
            .map(|(key, bytes)| (format!("plain/{key}"), Arc::new(bytes)))
            .collect();
        let bytes: usize = packs.iter().map(|(_, bytes)| bytes.len()).sum();
        let client = server().client();
        let name = &bucket.name;
        let plain = seconds(|| {
            runtime.block_on(each_plainly(packs.len(), |number| {
                let (key, bytes) = packs.get(number).cloned().expect("a pack");
                let put = client.put_object().bucket(name).key(key);
                let put = put.if_none_match("*");
                async move {
                    let body = ByteStream::from(bytes.to_vec());
                    drop(put.body(body).send().await.expect("uploaded"));
                }
            }));
        });
        let plain_down = seconds(|| {
            runtime.block_on(each_plainly(packs.len(), |number| {
                let (key, bytes) = packs.get(number).cloned().expect("a pack");
                let sent = client.get_object().bucket(name).key(key).send();
                async move {
                    let object = sent.await.expect("an object");
                    let read = object.body.collect().await.expect("its bytes");
                    assert_eq!(read.into_bytes().len(), bytes.len());
                }
            }));
        });
        let (near, beside) = backup(None);
        let beside_down = restore(&near);
        let ratio = |plain: f64, own: f64| plain / own;
        println!(
            "backup  {plain:6.2} {own:6.2} {:5.2}; {beside:6.2}   ({} packs, {} MiB)",
            ratio(plain, own),
            packs.len(),
            bytes >> 20
        );
        println!(
            "restore {plain_down:6.2} {own_down:6.2} {:5.2}; {beside_down:6.2}",
            ratio(plain_down, own_down)
        );
        up.push(ratio(plain, own));
        down.push(ratio(plain_down, own_down));
    }
    println!(
        "median ratio: backup {:.2}, restore {:.2}",
        median(up),
        median(down)
    );
}

fn main() {
    // `cargo test --benches` calls it too; it has no tests.
    if !std::env::args().any(|argument| argument == "--bench") {
        return;
    }
    let rounds = number_of("VMKEEP_BENCH_ROUNDS", 3);
    let objects = number_of("VMKEEP_BENCH_OBJECTS", 32);
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .expect("a runtime");
    if objects > 0 {
        transport(&runtime, rounds, objects);
    }
    match number_of("VMKEEP_BENCH_MIB", 512) {
        0 => {}
        mib => whole(&runtime, rounds, mib as u64),
    }
}

fn transport(runtime: &Runtime, rounds: usize, objects: usize) {
    let bucket = server().bucket();
    let store = bucket.open();
    let client = server().client();
    let data: Arc<Vec<u8>> = Arc::new(
        (0..OBJECT_BYTES)
            .map(|at| ((at * 2_654_435_761) >> 13) as u8)
            .collect(),
    );
    let name = |round: usize, number: usize| {
        ObjectName::new(&format!("own/{round}/{number}")).expect("a name")
    };
    let (mut up, mut down) = (Vec::new(), Vec::new());
    println!("{objects} objects of 16 MiB, {AT_ONCE} at once, MiB/s (plain client, vmkeep, ratio)");
    for round in 0..rounds {
        let plain = rate(objects, || {
            upload_plainly(runtime, client, &bucket, &data, objects, round)
        });
        let own = rate(objects, || {
            each(objects, |number| {
                store.create(&name(round, number), &data).expect("created")
            });
        });
        let plain_down = rate(objects, || {
            download_plainly(runtime, client, &bucket, objects, round)
        });
        let own_down = rate(objects, || {
            each(objects, |number| {
                let read = store.read(&name(round, number), u64::MAX).expect("read");
                assert_eq!(read.len(), OBJECT_BYTES);
            });
        });
        println!("up   {plain:7.0} {own:7.0} {:5.2}", own / plain);
        println!(
            "down {plain_down:7.0} {own_down:7.0} {:5.2}",
            own_down / plain_down
        );
        up.push(own / plain);
        down.push(own_down / plain_down);
    }
    println!(
        "median ratio: upload {:.2}, download {:.2}",
        median(up),
        median(down)
    );
}

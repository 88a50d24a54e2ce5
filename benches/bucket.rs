//! What the store makes of a bucket, beside the plain client with the same objects, as many at once, on
//! the same server: `cargo bench --bench bucket`. `VMKEEP_BENCH_ROUNDS` (3), `VMKEEP_BENCH_OBJECTS` (32).
//!
//! Ratios of alternating rounds: how fast a server on the same machine is says nothing of others.

#[path = "../tests/support/mod.rs"]
mod support;

use aws_sdk_s3::Client;
use aws_sdk_s3::primitives::ByteStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;
use support::s3::{Bucket, server};
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

fn main() {
    // `cargo test --benches` calls it too; it has no tests.
    if !std::env::args().any(|argument| argument == "--bench") {
        return;
    }
    let rounds = number_of("VMKEEP_BENCH_ROUNDS", 3);
    let objects = number_of("VMKEEP_BENCH_OBJECTS", 32);
    let bucket = server().bucket();
    let store = bucket.open();
    let client = server().client();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .expect("a runtime");
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
            upload_plainly(&runtime, client, &bucket, &data, objects, round)
        });
        let own = rate(objects, || {
            each(objects, |number| {
                store.create(&name(round, number), &data).expect("created")
            });
        });
        let plain_down = rate(objects, || {
            download_plainly(&runtime, client, &bucket, objects, round)
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

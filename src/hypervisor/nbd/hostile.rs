//! Peers that lie, stall and hang up: each must end in an error, none in a panic or wrong bytes.

use super::client::NbdClient;
use super::testing::{chunk, greeting, option_reply, read_option};
use super::{BASE_ALLOCATION, Endpoint, NbdError, reply, wire};
use crate::model::Extent;
use proptest::prelude::*;
use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::thread::JoinHandle;
use std::time::Duration;

const SIZE: u64 = 1 << 20;

fn data(offset: u64, content: &[u8]) -> Vec<u8> {
    [&offset.to_be_bytes(), content].concat()
}

fn hole(offset: u64, length: u32) -> Vec<u8> {
    [&offset.to_be_bytes()[..], &length.to_be_bytes()].concat()
}

fn status(context: u32, extents: &[(u32, u32)]) -> Vec<u8> {
    let mut bytes = context.to_be_bytes().to_vec();
    for (length, flags) in extents {
        bytes.extend_from_slice(&length.to_be_bytes());
        bytes.extend_from_slice(&flags.to_be_bytes());
    }
    bytes
}

/// Answers of a server to "read 1024 bytes at 4096" that must not be believed.
fn bad_reads(cookie: u64) -> Vec<(&'static str, Vec<u8>)> {
    let whole = [7; 1024];
    let mut huge = chunk(true, wire::CHUNK_DATA, cookie, &data(4096, &whole));
    huge[16..20].copy_from_slice(&u32::MAX.to_be_bytes());
    let mut flags = chunk(true, wire::CHUNK_DATA, cookie, &data(4096, &whole));
    flags[5] = 0x81;
    let mut simple = wire::SIMPLE_REPLY_MAGIC.to_be_bytes().to_vec();
    simple.extend_from_slice(&0u32.to_be_bytes());
    simple.extend_from_slice(&cookie.to_be_bytes());
    simple.extend_from_slice(&whole);
    let two = |first: Vec<u8>, second: Vec<u8>| {
        [
            chunk(false, wire::CHUNK_DATA, cookie, &first),
            chunk(true, wire::CHUNK_DATA, cookie, &second),
        ]
        .concat()
    };
    vec![
        ("nothing", Vec::new()),
        ("no magic", vec![0; 64]),
        (
            "half a header",
            chunk(true, wire::CHUNK_NONE, cookie, &[])[..9].to_vec(),
        ),
        ("no data at all", chunk(true, wire::CHUNK_NONE, cookie, &[])),
        (
            "hang-up in the data",
            chunk(true, wire::CHUNK_DATA, cookie, &data(4096, &whole))[..900].to_vec(),
        ),
        (
            "another cookie",
            chunk(true, wire::CHUNK_DATA, cookie ^ 1, &data(4096, &whole)),
        ),
        (
            "too short",
            chunk(true, wire::CHUNK_DATA, cookie, &data(4096, &whole[..1000])),
        ),
        (
            "too long",
            chunk(true, wire::CHUNK_DATA, cookie, &data(4096, &[7; 1025])),
        ),
        (
            "before the request",
            chunk(true, wire::CHUNK_DATA, cookie, &data(4095, &whole)),
        ),
        (
            "at another place",
            chunk(true, wire::CHUNK_DATA, cookie, &data(0, &whole)),
        ),
        (
            "wrapping offset",
            chunk(true, wire::CHUNK_DATA, cookie, &data(u64::MAX - 3, &whole)),
        ),
        (
            "empty data",
            chunk(true, wire::CHUNK_DATA, cookie, &data(4096, &[])),
        ),
        (
            "data without offset",
            chunk(true, wire::CHUNK_DATA, cookie, &[1, 2, 3]),
        ),
        ("huge length", huge),
        ("unknown flags", flags),
        ("simple reply with data", simple),
        (
            "overlap",
            two(data(4096, &whole[..600]), data(4600, &whole[..520])),
        ),
        ("twice", two(data(4096, &whole), data(4096, &whole))),
        (
            "gap",
            two(data(4096, &whole[..500]), data(4700, &whole[..420])),
        ),
        (
            "hole outside",
            chunk(true, wire::CHUNK_HOLE, cookie, &hole(4096, 2048)),
        ),
        (
            "empty hole",
            chunk(true, wire::CHUNK_HOLE, cookie, &hole(4096, 0)),
        ),
        (
            "part of a hole",
            chunk(true, wire::CHUNK_HOLE, cookie, &hole(4096, 512)),
        ),
        (
            "hole of odd length",
            chunk(true, wire::CHUNK_HOLE, cookie, &[0; 13]),
        ),
        (
            "status instead",
            chunk(true, wire::CHUNK_STATUS, cookie, &status(0, &[(1024, 0)])),
        ),
        ("unknown chunk", chunk(true, 77, cookie, &[])),
        ("error", chunk(true, 0x8001, cookie, &[0, 0, 0, 5, 0, 0])),
        (
            "error of number 0",
            chunk(true, 0x8001, cookie, &[0, 0, 0, 0, 0, 0]),
        ),
        (
            "error with a long text",
            chunk(true, 0x8001, cookie, &[0, 0, 0, 5, 0xff, 0xff]),
        ),
        ("unknown error", chunk(true, 0xffff, cookie, &[0; 8])),
        (
            "crumbs",
            (0..1024)
                .flat_map(|at| chunk(at == 1023, wire::CHUNK_DATA, cookie, &data(4096 + at, &[7])))
                .collect(),
        ),
        (
            "data, then an error",
            [
                chunk(false, wire::CHUNK_DATA, cookie, &data(4096, &whole)),
                chunk(
                    true,
                    0x8002,
                    cookie,
                    &[0, 0, 0, 5, 0, 0, 0, 0, 0, 0, 0, 0, 16, 0],
                ),
            ]
            .concat(),
        ),
    ]
}

fn bad_statuses(cookie: u64) -> Vec<(&'static str, Vec<u8>)> {
    let one = |payload: &[u8]| chunk(true, wire::CHUNK_STATUS, cookie, payload);
    vec![
        ("nothing", Vec::new()),
        ("no context", one(&[])),
        ("no extents", one(&status(5, &[]))),
        ("half an extent", one(&status(5, &[(4096, 0)])[..7])),
        ("empty extent", one(&status(5, &[(0, 0)]))),
        (
            "extent behind the request",
            one(&status(5, &[(4096, 0), (1, 0)])),
        ),
        ("another context", one(&status(6, &[(4096, 0)]))),
        (
            "another cookie",
            chunk(
                true,
                wire::CHUNK_STATUS,
                cookie ^ 1,
                &status(5, &[(4096, 0)]),
            ),
        ),
        ("without answer", chunk(true, wire::CHUNK_NONE, cookie, &[])),
        (
            "twice",
            [
                chunk(false, wire::CHUNK_STATUS, cookie, &status(5, &[(4096, 0)])),
                one(&status(5, &[(4096, 2)])),
            ]
            .concat(),
        ),
        ("error", chunk(true, 0x8001, cookie, &[0, 0, 0, 22, 0, 0])),
    ]
}

#[test]
fn a_read_that_is_not_answered_exactly_fails() {
    for (name, bytes) in bad_reads(9) {
        let mut buffer = [0xaa; 1024];
        let result = reply::receive_data(&mut &bytes[..], 9, 4096, &mut buffer);
        assert!(result.is_err(), "{name}");
    }
}

#[test]
fn a_read_in_pieces_in_any_order_with_holes_is_put_together() {
    let bytes = [
        chunk(false, wire::CHUNK_DATA, 9, &data(4096 + 512, &[2; 256])),
        chunk(false, wire::CHUNK_HOLE, 9, &hole(4096 + 768, 256)),
        chunk(false, wire::CHUNK_DATA, 9, &data(4096, &[1; 512])),
        chunk(true, wire::CHUNK_NONE, 9, &[]),
    ]
    .concat();
    let mut buffer = [0xaa; 1024];
    reply::receive_data(&mut &bytes[..], 9, 4096, &mut buffer).unwrap();
    assert!(buffer[..512].iter().all(|byte| *byte == 1));
    assert!(buffer[512..768].iter().all(|byte| *byte == 2));
    assert!(buffer[768..].iter().all(|byte| *byte == 0));
}

#[test]
fn a_status_that_is_not_answered_exactly_fails() {
    for (name, bytes) in bad_statuses(9) {
        let requested = Extent::new(8192, 4096);
        let result = reply::receive_status(&mut &bytes[..], 9, requested, &[5], 5);
        assert!(result.is_err(), "{name}");
    }
}

#[test]
fn a_status_reaching_beyond_the_request_is_cut() {
    let bytes = chunk(
        true,
        wire::CHUNK_STATUS,
        9,
        &status(5, &[(512, 3), (u32::MAX, 0)]),
    );
    let requested = Extent::new(8192, 4096);
    let extents = reply::receive_status(&mut &bytes[..], 9, requested, &[5], 5).unwrap();
    assert_eq!(extents[0].extent, Extent::new(8192, 512));
    assert_eq!(extents[1].extent, Extent::new(8704, 3584));
}

proptest! {
    #[test]
    fn no_bytes_make_the_parsers_panic(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
        let mut buffer = [0; 1024];
        let _ = reply::receive_data(&mut &bytes[..], 9, 4096, &mut buffer);
        let _ = reply::receive_status(&mut &bytes[..], 9, Extent::new(0, 4096), &[5], 5);
        let _ = reply::receive_done(&mut &bytes[..], 9);
        let _ = wire::error_chunk(&bytes);
        let _ = wire::block_sizes(wire::Fields::new(&bytes));
    }

    #[test]
    fn damage_to_a_header_or_offset_never_gives_other_bytes(at in 0usize..28, byte in any::<u8>()) {
        let content: Vec<u8> = (0..1024u32).map(|number| (number % 251) as u8).collect();
        let mut bytes = chunk(true, wire::CHUNK_DATA, 9, &data(4096, &content));
        bytes[at] = byte;
        let mut buffer = [0xaa; 1024];
        if reply::receive_data(&mut &bytes[..], 9, 4096, &mut buffer).is_ok() {
            prop_assert_eq!(&buffer[..], &content[..]);
        }
    }
}

/// A server that shakes hands properly and then answers its first request with `answer`.
struct FakeServer {
    _folder: tempfile::TempDir,
    endpoint: Endpoint,
    thread: JoinHandle<()>,
}

fn serve(
    listener: &UnixListener,
    block_sizes: [u32; 3],
    answer: impl FnOnce(u64) -> Vec<u8>,
) -> std::io::Result<UnixStream> {
    let mut stream = shake_hands(listener, block_sizes, SIZE)?;
    let (cookie, _) = read_request(&mut stream)?;
    stream.write_all(&answer(cookie))?;
    Ok(stream)
}

/// Cookie and length of the next request.
fn read_request(stream: &mut UnixStream) -> std::io::Result<(u64, u32)> {
    let mut request = [0; 28];
    stream.read_exact(&mut request)?;
    let mut fields = wire::Fields::new(&request[8..]);
    let (cookie, _, length) = (fields.u64().unwrap(), fields.u64(), fields.u32().unwrap());
    Ok((cookie, length))
}

fn shake_hands(
    listener: &UnixListener,
    block_sizes: [u32; 3],
    size: u64,
) -> std::io::Result<UnixStream> {
    let (mut stream, _) = listener.accept()?;
    stream.write_all(&greeting())?;
    stream.read_exact(&mut [0; 4])?;
    loop {
        let (option, _) = read_option(&mut stream)?;
        let reply = match option {
            wire::OPTION_SET_META_CONTEXT => [
                option_reply(
                    option,
                    wire::REPLY_META_CONTEXT,
                    &[&5u32.to_be_bytes()[..], BASE_ALLOCATION.as_bytes()].concat(),
                ),
                option_reply(option, wire::REPLY_ACK, &[]),
            ]
            .concat(),
            wire::OPTION_GO => {
                let export = [&[0, 0][..], &size.to_be_bytes(), &[1, 7]].concat();
                let mut blocks = vec![0, 3];
                for size in block_sizes {
                    blocks.extend_from_slice(&size.to_be_bytes());
                }
                [
                    option_reply(option, wire::REPLY_INFO, &export),
                    option_reply(option, wire::REPLY_INFO, &blocks),
                    option_reply(option, wire::REPLY_ACK, &[]),
                ]
                .concat()
            }
            _ => option_reply(option, wire::REPLY_ACK, &[]),
        };
        stream.write_all(&reply)?;
        if option == wire::OPTION_GO {
            return Ok(stream);
        }
    }
}

impl FakeServer {
    fn start(
        block_sizes: [u32; 3],
        answer: impl FnOnce(u64) -> Vec<u8> + Send + 'static,
        then: impl FnOnce(UnixStream) + Send + 'static,
    ) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("s");
        let listener = UnixListener::bind(&socket).unwrap();
        // A client may hang up at any point of this; that is not the server's failure.
        let thread = std::thread::spawn(move || {
            if let Ok(stream) = serve(&listener, block_sizes, answer) {
                then(stream);
            }
        });
        let mut endpoint = Endpoint::new(socket, "").with_context(BASE_ALLOCATION);
        endpoint.timeout = Duration::from_secs(20);
        FakeServer {
            _folder: folder,
            endpoint,
            thread,
        }
    }
}

const PLAIN: [u32; 3] = [1, 4096, 32 << 20];

#[test]
fn a_lying_server_gets_an_error_out_of_every_read() {
    let count = bad_reads(0).len();
    for number in 0..count {
        let server = FakeServer::start(
            PLAIN,
            move |cookie| bad_reads(cookie)[number].1.clone(),
            drop,
        );
        let client = NbdClient::connect(server.endpoint.clone()).unwrap();
        let mut buffer = [0xaa; 1024];
        let result = client.read_at(4096, &mut buffer);
        assert!(result.is_err(), "{}", bad_reads(0)[number].0);
        drop(client);
        server.thread.join().unwrap();
    }
}

#[test]
fn a_lying_server_gets_an_error_out_of_every_status() {
    let count = bad_statuses(0).len();
    for number in 0..count {
        let server = FakeServer::start(
            PLAIN,
            move |cookie| bad_statuses(cookie)[number].1.clone(),
            drop,
        );
        let client = NbdClient::connect(server.endpoint.clone()).unwrap();
        let result = client.status(BASE_ALLOCATION, Extent::new(8192, 4096));
        assert!(result.is_err(), "{}", bad_statuses(0)[number].0);
        drop(client);
        server.thread.join().unwrap();
    }
}

#[test]
fn a_server_that_falls_silent_is_left_in_time() {
    let mut server = FakeServer::start(
        PLAIN,
        |cookie| chunk(true, wire::CHUNK_DATA, cookie, &data(4096, &[7; 1024]))[..100].to_vec(),
        // Until the client hangs up.
        |mut stream| drop(stream.read(&mut [0])),
    );
    server.endpoint.timeout = Duration::from_millis(300);
    let client = NbdClient::connect(server.endpoint.clone()).unwrap();
    let result = client.read_at(4096, &mut [0; 1024]);
    assert!(matches!(result, Err(NbdError::TimedOut)), "{result:?}");
    server.thread.join().unwrap();
}

#[test]
fn a_flush_has_a_limit_of_its_own() {
    let flushed_within = |limit: Duration| {
        let mut server = FakeServer::start(
            PLAIN,
            |cookie| {
                std::thread::sleep(Duration::from_millis(900));
                chunk(true, wire::CHUNK_NONE, cookie, &[])
            },
            |mut stream| drop(stream.read(&mut [0])),
        );
        server.endpoint.timeout = Duration::from_millis(300);
        server.endpoint.flush_timeout = limit;
        let client = NbdClient::connect(server.endpoint.clone()).unwrap();
        let result = client.flush();
        drop(client);
        server.thread.join().unwrap();
        result
    };
    let result = flushed_within(Duration::from_secs(20));
    assert!(result.is_ok(), "{result:?}");
    let result = flushed_within(Duration::from_millis(300));
    assert!(matches!(result, Err(NbdError::TimedOut)), "{result:?}");
}

#[test]
fn a_connection_that_failed_is_not_used_again() {
    // The second reply would fit a second request, were the stream still believed.
    let server = FakeServer::start(
        PLAIN,
        |cookie| {
            [
                chunk(true, 0x8001, cookie, &[0, 0, 0, 5, 0, 0]),
                chunk(true, wire::CHUNK_DATA, cookie + 1, &data(4096, &[7; 1024])),
            ]
            .concat()
        },
        |mut stream| drop(stream.read(&mut [0])),
    );
    let client = NbdClient::connect(server.endpoint.clone()).unwrap();
    let first = client.read_at(4096, &mut [0; 1024]);
    assert!(matches!(first, Err(NbdError::Server { errno: 5, .. })));
    server.thread.join().unwrap();
    assert!(client.read_at(4096, &mut [0; 1024]).is_err());
}

#[test]
fn a_read_across_blocks_is_widened_to_whole_ones() {
    let server = FakeServer::start(
        [4096, 4096, 32 << 20],
        |cookie| {
            let content: Vec<u8> = (0..8192u32).map(|at| (at % 251) as u8).collect();
            chunk(true, wire::CHUNK_DATA, cookie, &data(4096, &content))
        },
        drop,
    );
    let client = NbdClient::connect(server.endpoint.clone()).unwrap();
    let mut buffer = [0; 200];
    client.read_at(8100, &mut buffer).unwrap();
    let expected: Vec<u8> = (4004..4204u32).map(|at| (at % 251) as u8).collect();
    assert_eq!(&buffer[..], &expected[..]);
}

#[test]
fn impossible_block_sizes_are_refused() {
    for sizes in [
        [0, 4096, 4096],
        [3, 4096, 4096],
        [1 << 20, 1 << 20, 1 << 20],
        [4096, 512, 4096],
        [512, 4096, 4097],
        [512, 4096, 512],
    ] {
        let server = FakeServer::start(sizes, |_| Vec::new(), drop);
        let result = NbdClient::connect(server.endpoint.clone());
        assert!(matches!(result, Err(NbdError::Protocol(_))), "{sizes:?}");
        server.thread.join().unwrap();
    }
}

/// What a server says first, instead of a proper handshake.
#[test]
fn a_peer_that_is_no_nbd_server_is_refused() {
    let long_reply = {
        let mut bytes = greeting();
        let mut reply = option_reply(wire::OPTION_STRUCTURED_REPLY, wire::REPLY_ACK, &[]);
        reply[16..20].copy_from_slice(&u32::MAX.to_be_bytes());
        bytes.extend(reply);
        bytes
    };
    let stall = {
        let mut bytes = greeting();
        bytes.extend(option_reply(
            wire::OPTION_STRUCTURED_REPLY,
            wire::REPLY_ACK,
            &[],
        ));
        for id in 0..100u32 {
            let context = [&id.to_be_bytes()[..], b"base:allocation"].concat();
            bytes.extend(option_reply(
                wire::OPTION_SET_META_CONTEXT,
                wire::REPLY_META_CONTEXT,
                &context,
            ));
        }
        bytes
    };
    let refused = {
        let mut bytes = greeting();
        let error = wire::REPLY_ERROR_BIT | 1;
        bytes.extend(option_reply(
            wire::OPTION_STRUCTURED_REPLY,
            error,
            b"no\n\x1b[31m",
        ));
        bytes
    };
    let mut old = greeting();
    old[17] = 0;
    for bytes in [
        Vec::new(),
        b"HTTP/1.1 400 Bad Request\r\n\r\n".to_vec(),
        vec![0; 4096],
        old,
        long_reply,
        stall,
        refused,
    ] {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("s");
        let listener = UnixListener::bind(&socket).unwrap();
        let thread = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let _ = stream.write_all(&bytes);
            let _ = stream.shutdown(std::net::Shutdown::Write);
            let _ = stream.read_to_end(&mut Vec::new());
        });
        let mut endpoint = Endpoint::new(socket, "").with_context(BASE_ALLOCATION);
        endpoint.timeout = Duration::from_secs(20);
        let Err(error) = NbdClient::connect(endpoint) else {
            panic!("a handshake that never was");
        };
        assert!(!error.to_string().contains('\x1b'));
        thread.join().unwrap();
    }
}

/// A peer that says this as its whole side of the handshake, and then waits.
fn handshake_with(bytes: Vec<u8>, pause: Duration, limit: Duration) -> NbdError {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("s");
    let listener = UnixListener::bind(&socket).unwrap();
    let thread = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let length = match pause.is_zero() {
            true => bytes.len(),
            false => 1,
        };
        for part in bytes.chunks(length) {
            if stream.write_all(part).is_err() {
                return;
            }
            std::thread::sleep(pause);
        }
        let _ = stream.read_to_end(&mut Vec::new());
    });
    let mut endpoint = Endpoint::new(socket, "").with_context(BASE_ALLOCATION);
    endpoint.timeout = limit;
    let error = NbdClient::connect(endpoint).err();
    thread.join().unwrap();
    error.expect("a handshake that never was")
}

fn context(number: u32, name: &[u8]) -> Vec<u8> {
    let payload = [&number.to_be_bytes()[..], name].concat();
    option_reply(
        wire::OPTION_SET_META_CONTEXT,
        wire::REPLY_META_CONTEXT,
        &payload,
    )
}

fn info(kind: u16, rest: &[&[u8]]) -> Vec<u8> {
    let payload = [&kind.to_be_bytes()[..], &rest.concat()].concat();
    option_reply(wire::OPTION_GO, wire::REPLY_INFO, &payload)
}

fn export(size: u64) -> Vec<u8> {
    info(wire::INFO_EXPORT, &[&size.to_be_bytes(), &[1, 3]])
}

#[test]
fn a_handshake_that_lies_is_refused() {
    let ack = |option: u32| option_reply(option, wire::REPLY_ACK, &[]);
    let start = [greeting(), ack(wire::OPTION_STRUCTURED_REPLY)].concat();
    let (meta, go) = (ack(wire::OPTION_SET_META_CONTEXT), ack(wire::OPTION_GO));
    let base = context(5, b"base:allocation");
    let contexts = [&start[..], &base, &meta].concat();
    let sizes = |sizes: [u32; 3]| info(3, &sizes.map(u32::to_be_bytes).each_ref().map(|b| &b[..]));
    let cases: Vec<(&str, Vec<Vec<u8>>)> = vec![
        ("no context", vec![start.clone(), meta.clone()]),
        (
            "a context that nobody asked for",
            vec![start.clone(), context(5, b"base:x"), meta.clone()],
        ),
        (
            "a context twice",
            vec![start.clone(), base.clone(), base.clone(), meta.clone()],
        ),
        (
            "a context without number",
            vec![start.clone(), context(5, b"")],
        ),
        (
            "a context that is no text",
            vec![start.clone(), context(5, b"\xff\xfe"), meta.clone()],
        ),
        (
            "an answer to another option",
            vec![
                start.clone(),
                option_reply(wire::OPTION_GO, wire::REPLY_META_CONTEXT, &[0; 8]),
            ],
        ),
        (
            "structured replies with a payload",
            vec![
                greeting(),
                option_reply(wire::OPTION_STRUCTURED_REPLY, wire::REPLY_ACK, &[1]),
            ],
        ),
        ("no description", vec![contexts.clone(), go.clone()]),
        (
            "described twice",
            vec![contexts.clone(), export(SIZE), export(SIZE * 2), go.clone()],
        ),
        ("no bytes", vec![contexts.clone(), export(0), go.clone()]),
        (
            "more bytes than any disk",
            vec![contexts.clone(), export(u64::MAX), go.clone()],
        ),
        (
            "a negative size",
            vec![contexts.clone(), export(1 << 63), go.clone()],
        ),
        (
            "half a block",
            vec![contexts.clone(), export(SIZE + 1), go.clone()],
        ),
        (
            "half a large block",
            vec![
                contexts.clone(),
                export(4096 + 512),
                sizes([4096, 4096, 4096]),
                go.clone(),
            ],
        ),
        (
            "half a description",
            vec![contexts.clone(), info(0, &[&[0; 9]]), go.clone()],
        ),
        (
            "descriptions without end",
            vec![contexts.clone(), info(1, &[b"x"]).repeat(1000)],
        ),
        (
            "an acknowledgement with a payload",
            vec![
                contexts,
                export(SIZE),
                option_reply(wire::OPTION_GO, wire::REPLY_ACK, &[7]),
            ],
        ),
    ];
    for (what, parts) in cases {
        let error = handshake_with(parts.concat(), Duration::ZERO, Duration::from_secs(20));
        assert!(
            !matches!(error, NbdError::TimedOut | NbdError::Closed),
            "{what}: {error}"
        );
    }
}

#[test]
fn a_handshake_byte_by_byte_does_not_stretch_the_limit() {
    let bytes = [greeting(), vec![0; 4096]].concat();
    let error = handshake_with(bytes, Duration::from_millis(30), Duration::from_millis(300));
    assert!(matches!(error, NbdError::TimedOut), "{error}");
}

#[test]
fn a_read_byte_by_byte_does_not_stretch_the_limit() {
    let mut server = FakeServer::start(
        PLAIN,
        |_| Vec::new(),
        |mut stream| {
            for byte in chunk(true, wire::CHUNK_DATA, 1, &data(4096, &[7; 1024])) {
                if stream.write_all(&[byte]).is_err() {
                    return;
                }
                std::thread::sleep(Duration::from_millis(20));
            }
        },
    );
    server.endpoint.timeout = Duration::from_millis(300);
    let client = NbdClient::connect(server.endpoint.clone()).unwrap();
    let result = client.read_at(4096, &mut [0; 1024]);
    assert!(matches!(result, Err(NbdError::TimedOut)), "{result:?}");
    server.thread.join().unwrap();
}

/// A server that answers every status request with these extents, after a pause.
fn answers_statuses_with(
    size: u64,
    extents: Vec<(u32, u32)>,
    pause: Duration,
) -> (tempfile::TempDir, Endpoint) {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("s");
    let listener = UnixListener::bind(&socket).unwrap();
    std::thread::spawn(move || -> std::io::Result<()> {
        let mut stream = shake_hands(&listener, PLAIN, size)?;
        loop {
            let (cookie, _) = read_request(&mut stream)?;
            std::thread::sleep(pause);
            let payload = status(5, &extents);
            stream.write_all(&chunk(true, wire::CHUNK_STATUS, cookie, &payload))?;
        }
    });
    let endpoint = Endpoint::new(socket, "").with_context(BASE_ALLOCATION);
    (folder, endpoint)
}

#[test]
fn a_status_in_crumbs_does_not_stretch_the_limit() {
    let pause = Duration::from_millis(20);
    let (_folder, mut endpoint) = answers_statuses_with(1 << 30, vec![(4096, 0)], pause);
    endpoint.timeout = Duration::from_millis(300);
    let client = NbdClient::connect(endpoint).unwrap();
    let (sender, done) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let result = client.status(BASE_ALLOCATION, Extent::new(0, 1 << 30));
        let _ = sender.send(result);
    });
    let result = done.recv_timeout(Duration::from_secs(20));
    assert!(matches!(result, Ok(Err(NbdError::TimedOut))), "{result:?}");
}

#[test]
fn a_status_of_endless_pieces_does_not_fill_the_memory() {
    let extents = (0..100_000).map(|at| (1, at % 2)).collect();
    let size = crate::model::MAX_DISK_BYTES;
    let (_folder, endpoint) = answers_statuses_with(size, extents, Duration::ZERO);
    let client = NbdClient::connect(endpoint).unwrap();
    let (sender, done) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let result = client.status(BASE_ALLOCATION, Extent::new(0, size));
        let _ = sender.send(result.map(|extents| extents.len()));
    });
    let result = done.recv_timeout(Duration::from_secs(60));
    assert!(
        matches!(result, Ok(Err(NbdError::TooManyPieces))),
        "{result:?}"
    );
}

#[test]
fn a_second_connection_to_another_export_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("s");
    let listener = UnixListener::bind(&socket).unwrap();
    let server = std::thread::spawn(move || {
        // The first fails its request, so that the client opens another.
        let first = shake_hands(&listener, PLAIN, SIZE).unwrap();
        drop(first);
        let second = shake_hands(&listener, PLAIN, SIZE * 2);
        let _ = second.map(|mut stream| stream.read_to_end(&mut Vec::new()));
    });
    let endpoint = Endpoint::new(socket, "").with_context(BASE_ALLOCATION);
    let client = NbdClient::connect(endpoint).unwrap();
    assert!(client.read_at(0, &mut [0; 512]).is_err());
    let result = client.read_at(0, &mut [0; 512]);
    assert!(matches!(result, Err(NbdError::Protocol(_))), "{result:?}");
    server.join().unwrap();
}

#[test]
fn only_the_flag_zero_lets_a_range_go_unread() {
    // A hole that does not say that it reads as zero may read as anything; so may what we do not
    // know.
    let flags = [
        (1024, 0),
        (1024, 1),
        (1024, 3),
        (1024, 2),
        (1024, 4),
        (1024, 6),
        (2048, 0),
    ];
    let (_folder, endpoint) = answers_statuses_with(SIZE, flags.to_vec(), Duration::ZERO);
    let client = NbdClient::connect(endpoint).unwrap();
    let allocated = crate::hypervisor::nbd_disk::allocated(&client, Extent::new(0, 8192)).unwrap();
    let expected =
        [(0, 2048), (4096, 1024), (6144, 2048)].map(|(at, length)| Extent::new(at, length));
    assert_eq!(allocated, expected);
}

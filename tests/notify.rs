//! `vmkeep notify test` against receivers that take, refuse, fail for a while, and hang.

use vmkeep_test_support as support;

use jiff::Timestamp;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::time::{Duration, Instant};
use support::{
    Certificate, Host, HostOptions, HttpSink, MailOptions, MailSink, Ran, path_text, time,
};

const PASSWORD: &str = "s3cret-password";
/// `printf '\0vmkeep\0s3cret-password' | base64`
const SIGN_IN: &str = "AHZta2VlcABzM2NyZXQtcGFzc3dvcmQ=";

fn at() -> Timestamp {
    time("2031-02-10T23:00:00Z")
}

/// A host that tells what `notify` says.
fn host(notify: &str) -> Host {
    let host = Host::new(&HostOptions::default());
    let config = host.config_text();
    host.write_config(&format!("{config}\n[notify]\njournald = false\n{notify}\n"));
    host
}

fn test(host: &Host) -> Ran {
    host.vmkeep(&["notify", "test"], at())
}

fn webhook(sink: &HttpSink) -> String {
    format!("[[notify.webhook]]\nurl = \"{}/s3cret-hook\"\n", sink.url)
}

fn ping(sink: &HttpSink) -> String {
    format!("[[notify.ping]]\nurl = \"{}/s3cret-ping\"\n", sink.url)
}

fn mail(sink: &MailSink, lines: &str) -> String {
    format!(
        "[[notify.mail]]\nserver = \"127.0.0.1\"\nport = {}\nfrom = \"vmkeep@example.com\"\n\
         to = [\"admin@example.com\", \"second@example.com\"]\n{lines}\n",
        sink.port
    )
}

const CLEAR: &str = "tls = \"none\"";

/// A file that only its owner can read, with this in it.
fn secret_file(host: &Host, name: &str, text: &str) -> String {
    let file = host.path(name);
    fs::write(&file, format!("{text}\n")).unwrap();
    fs::set_permissions(&file, fs::Permissions::from_mode(0o600)).unwrap();
    path_text(&file).to_string()
}

fn add(host: &Host, lines: &str) {
    host.write_config(&format!("{}\n{lines}\n", host.config_text()));
}

#[track_caller]
fn shows_no_secret(ran: &Ran) -> &Ran {
    for secret in ["s3cret", SIGN_IN] {
        assert!(!ran.stdout.contains(secret), "{ran}");
        assert!(!ran.stderr.contains(secret), "{ran}");
    }
    ran
}

#[test]
fn every_receiver_is_told_and_says_so() {
    let (hook, mails, watcher) = (HttpSink::start(), MailSink::start(), HttpSink::start());
    let host = host(&[webhook(&hook), mail(&mails, CLEAR), ping(&watcher)].concat());
    let ran = test(&host);
    shows_no_secret(&ran).exits(0).says("delivered");
    assert_eq!(ran.stdout.lines().count(), 3, "{ran}");

    let requests = hook.received();
    let [request] = requests.as_slice() else {
        panic!("one request: {requests:?}");
    };
    assert_eq!(
        (request.method.as_str(), request.path.as_str()),
        ("POST", "/s3cret-hook")
    );
    assert_eq!(request.headers["content-type"], "application/json");
    assert!(request.headers["user-agent"].starts_with("vmkeep/"));
    let document = request.document();
    assert_eq!(document["version"], 1);
    assert_eq!(document["host"], "host1");
    let message = &document["messages"][0];
    assert_eq!(message["event"], "report");
    assert_eq!(message["severity"], "info");
    assert_eq!(message["at"], "2031-02-10T23:00:00Z");
    assert!(message["key"].is_null() && message["report"].is_null());
    assert!(message["text"].as_str().unwrap().contains("host1"));

    let received = mails.received();
    let [mail] = received.as_slice() else {
        panic!("one mail: {received:?}");
    };
    assert_eq!(mail.from, "vmkeep@example.com");
    assert_eq!(mail.to, ["admin@example.com", "second@example.com"]);
    assert_eq!(mail.header("To"), "admin@example.com, second@example.com");
    assert_eq!(
        mail.header("Subject"),
        "[vmkeep host1] a test of the notifications"
    );
    assert_eq!(mail.header("Auto-Submitted"), "auto-generated");
    assert_eq!(mail.header("Date"), "Mon, 10 Feb 2031 23:00:00 +0000");
    assert!(mail.header("Message-ID").ends_with("@example.com>"));
    // Long lines are folded.
    let body = mail.body().replace("=\r\n", "");
    assert!(body.contains("vmkeep notify test"), "{body}");

    let pings = watcher.received();
    let paths: Vec<&str> = pings.iter().map(|ping| ping.path.as_str()).collect();
    assert_eq!(paths, ["/s3cret-ping/start", "/s3cret-ping"]);
    assert!(pings.iter().all(|ping| ping.text().contains("host1")));
}

#[test]
fn programs_are_told_in_one_document() {
    let (good, bad) = (HttpSink::start(), HttpSink::start());
    bad.answer_with(&[404]);
    let host = host(&[webhook(&good), webhook(&bad)].concat());
    let ran = host.vmkeep(&["--json", "notify", "test"], at());
    shows_no_secret(&ran).exits(1);
    let document = ran.document();
    assert_eq!(
        (&document["delivered"], &document["failed"]),
        (&1.into(), &1.into())
    );
    let second = &document["receivers"][1];
    assert_eq!(second["delivered"], false);
    assert_eq!(second["trouble"]["kind"], "refused");
    assert_eq!(second["trouble"]["detail"], "answered 404 Not Found");
}

#[test]
fn what_may_pass_is_tried_again_as_the_same() {
    let hook = HttpSink::start();
    hook.answer_with(&[500]);
    hook.answer_with_headers(429, &[("retry-after", "1")]);
    let host = host(&webhook(&hook));
    let start = Instant::now();
    test(&host).exits(0);
    assert!(start.elapsed() >= Duration::from_secs(1), "it did not wait");
    let requests = hook.received();
    assert_eq!(requests.len(), 3);
    let keys = requests.iter().map(|one| &one.headers["idempotency-key"]);
    let keys: std::collections::BTreeSet<_> = keys.collect();
    assert_eq!(keys.len(), 1, "{keys:?}");
    assert!(requests.iter().all(|one| one.body == requests[0].body));
}

#[test]
fn a_refusal_is_not_tried_again() {
    for status in [400, 401, 404, 410] {
        let hook = HttpSink::start();
        hook.answer_with(&[status]);
        let host = host(&webhook(&hook));
        let ran = test(&host);
        shows_no_secret(&ran)
            .exits(1)
            .says(&format!("refused: answered {status}"));
        ran.says("hint:");
        assert_eq!(hook.received().len(), 1);
    }
}

#[test]
fn a_message_is_not_sent_to_another_place() {
    let (hook, other) = (HttpSink::start(), HttpSink::start());
    let elsewhere = format!("{}/elsewhere", other.url);
    let host = host(&webhook(&hook));
    for status in [301, 302, 303, 307, 308] {
        hook.answer_with_headers(status, &[("location", &elsewhere)]);
        let ran = test(&host);
        shows_no_secret(&ran)
            .exits(1)
            .says(&format!("answered {status}"));
    }
    assert_eq!(other.received().len(), 0);
    // At the same place it is the same message, or it is not followed.
    hook.answer_with_headers(302, &[("location", "/moved")]);
    test(&host).exits(1);
    hook.answer_with_headers(308, &[("location", "/moved")]);
    test(&host).exits(0);
    let requests = hook.received();
    let [.., before, moved] = requests.as_slice() else {
        panic!("{requests:?}");
    };
    assert_eq!(
        (moved.method.as_str(), moved.path.as_str()),
        ("POST", "/moved")
    );
    assert_eq!(moved.body, before.body);
    // Not for ever.
    for _ in 0..10 {
        hook.answer_with_headers(308, &[("location", "/moved")]);
    }
    test(&host).exits(1).says("answered 308");
}

#[test]
fn who_hangs_is_given_up_and_keeps_the_news_from_nobody() {
    let (silent, hook, mails) = (HttpSink::start(), HttpSink::start(), MailSink::start());
    silent.fall_silent();
    // A mail server that takes connections and never greets.
    let mute = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = mute.local_addr().unwrap().port();
    let lines = mail(&mails, CLEAR);
    let parts = [
        "timeout = \"2s\"\n".to_string(),
        webhook(&silent),
        lines.replace(&mails.port.to_string(), &port.to_string()),
        ping(&silent),
        webhook(&hook),
        lines,
    ];
    let host = host(&parts.concat());
    let start = Instant::now();
    let ran = test(&host);
    let took = start.elapsed();
    shows_no_secret(&ran).exits(1).says("no answer within 2s");
    // Three that hang, one after the other.
    assert!(took >= Duration::from_secs(6), "{took:?}\n{ran}");
    assert!(took < Duration::from_secs(20), "{took:?}\n{ran}");
    assert_eq!(
        ran.stdout
            .matches("not reached: no answer within 2s")
            .count(),
        3,
        "{ran}"
    );
    assert_eq!(ran.stdout.matches(": delivered").count(), 2, "{ran}");
    assert_eq!((hook.received().len(), mails.received().len()), (1, 1));
}

#[test]
fn who_is_not_there_is_named_by_its_host_alone() {
    let hook = HttpSink::start();
    let gone = HttpSink::start();
    let lines = format!("timeout = \"1s\"\n{}{}", webhook(&gone), ping(&gone));
    let place = gone.url.replace("http://", "");
    drop(gone);
    let host = host(&format!("{lines}{}", webhook(&hook)));
    let ran = test(&host);
    shows_no_secret(&ran).exits(1);
    ran.says(&format!(
        "webhook {place}: not reached: cannot be reached: "
    ));
    ran.says("Connection refused");
    assert_eq!(hook.received().len(), 1);
    let verbose = host.vmkeep(&["-vv", "notify", "test"], at());
    shows_no_secret(&verbose).exits(1);
}

#[test]
fn headers_addresses_and_signatures_come_from_places_that_keep_them() {
    let hook = HttpSink::start();
    let host = host("");
    let token = secret_file(&host, "token", "Bearer s3cret-token");
    let key = secret_file(&host, "key", "s3cret-key");
    let url = secret_file(&host, "url", &format!("{}/s3cret-hook", hook.url));
    add(
        &host,
        &format!(
            "[[notify.webhook]]\nurl_file = \"{url}\"\nsigning_key_file = \"{key}\"\n\
             headers = {{ Authorization = {{ file = \"{token}\" }}, X-Site = \"ams1\" }}\n"
        ),
    );
    shows_no_secret(&test(&host)).exits(0);
    let requests = hook.received();
    let request = &requests[0];
    assert_eq!(request.path, "/s3cret-hook");
    assert_eq!(request.headers["authorization"], "Bearer s3cret-token");
    assert_eq!(request.headers["x-site"], "ams1");
    // The other side computes it in its own way.
    let body = host.path("body");
    fs::write(&body, &request.body).unwrap();
    let arguments = ["dgst", "-sha256", "-hmac", "s3cret-key", path_text(&body)];
    let computed = support::tool("openssl", &arguments);
    let computed = computed.trim().rsplit(' ').next().unwrap();
    assert_eq!(
        request.headers["vmkeep-signature"],
        format!("sha256={computed}")
    );

    // What others can read is no secret, for each of them, and the hint says what to type.
    for file in [&token, &key, &url] {
        for mode in [0o640, 0o604] {
            fs::set_permissions(file, fs::Permissions::from_mode(mode)).unwrap();
            let ran = test(&host);
            shows_no_secret(&ran).exits(1);
            ran.says(&format!("chmod 0600 {file}"))
                .says("webhook 1 of the configuration");
        }
        fs::set_permissions(file, fs::Permissions::from_mode(0o600)).unwrap();
    }
    assert_eq!(hook.received().len(), 1);
    // An address in a file is held to the same rules.
    secret_file(&host, "url", "http://hooks.example.com/s3cret");
    shows_no_secret(&test(&host))
        .exits(1)
        .says("allow_http = true");
}

#[test]
fn a_certificate_is_believed_only_from_its_authority() {
    let certificate = Certificate::new();
    let hook = HttpSink::with_tls(&certificate);
    let mails = MailSink::with(MailOptions::starttls(&certificate));
    let ca = format!("ca_file = \"{}\"", path_text(&certificate.file()));
    let both = |ca: &str| format!("{}{ca}\n{}", webhook(&hook), mail(&mails, ca));
    test(&host(&both(&ca))).exits(0);
    assert_eq!((hook.received().len(), mails.received().len()), (1, 1));
    let stranger = Certificate::new();
    let other = format!("ca_file = \"{}\"", path_text(&stranger.file()));
    let ran = test(&host(&both(&other)));
    shows_no_secret(&ran).exits(1);
    let distrusted = ran
        .stdout
        .matches("misconfigured: its certificate is not believed");
    assert_eq!(distrusted.count(), 2, "{ran}");
    assert_eq!((hook.received().len(), mails.received().len()), (1, 1));
}

#[test]
fn mail_is_encrypted_before_a_password_is_told() {
    let certificate = Certificate::new();
    let sign_in = Some(SIGN_IN);
    for (options, tls) in [
        (MailOptions::starttls(&certificate), ""),
        (MailOptions::wrapped(&certificate), "tls = \"tls\"\n"),
    ] {
        let mails = MailSink::with(MailOptions { sign_in, ..options });
        let host = host("");
        let password = secret_file(&host, "password", PASSWORD);
        let ca = certificate.file();
        add(
            &host,
            &mail(
                &mails,
                &format!(
                    "{tls}ca_file = \"{}\"\nusername = \"vmkeep\"\npassword_file = \"{password}\"",
                    path_text(&ca)
                ),
            ),
        );
        shows_no_secret(&test(&host)).exits(0);
        let received = mails.received();
        assert_eq!(received.len(), 1);
        assert!(received[0].encrypted);
        assert_eq!(received[0].signed_in.as_deref(), Some(SIGN_IN));
        // A wrong one is refused, not tried again, and not shown by what the server repeats.
        secret_file(&host, "password", "s3cret-but-wrong");
        let ran = test(&host);
        shows_no_secret(&ran)
            .exits(1)
            .says("refused: signing in")
            .says("535");
        let attempts = mails.commands();
        let attempts = attempts.iter().filter(|line| line.starts_with("AUTH"));
        assert_eq!(attempts.count(), 2);
    }
}

#[test]
fn a_server_that_offers_no_starttls_gets_nothing() {
    let mails = MailSink::with(MailOptions {
        sign_in: Some(SIGN_IN),
        ..MailOptions::default()
    });
    let host = host("");
    let password = secret_file(&host, "password", PASSWORD);
    let lines = format!("username = \"vmkeep\"\npassword_file = \"{password}\"");
    add(&host, &mail(&mails, &lines));
    let ran = test(&host);
    shows_no_secret(&ran).exits(1).says("offers no STARTTLS");
    assert_eq!(mails.received().len(), 0);
    let commands = mails.commands();
    assert!(
        commands
            .iter()
            .all(|line| line.starts_with("EHLO") || line == "QUIT"),
        "{commands:?}"
    );
}

#[test]
fn a_mail_that_is_put_off_comes_again_as_the_same() {
    let mails = MailSink::start();
    mails.answer_with(&["451 4.7.1 greylisted"]);
    test(&host(&mail(&mails, CLEAR))).exits(0);
    assert_eq!(mails.received().len(), 1);
    let data = mails.commands();
    assert_eq!(data.iter().filter(|line| *line == "DATA").count(), 2);
    mails.answer_with(&["554 5.7.1 spam"]);
    test(&host(&mail(&mails, CLEAR)))
        .exits(1)
        .says("refused: the mail: the server answered 554");
    assert_eq!(mails.received().len(), 1);
}

#[test]
fn a_recipient_who_is_refused_keeps_the_mail_from_no_other() {
    let mails = MailSink::with(MailOptions {
        unknown: &["admin@example.com"],
        ..MailOptions::default()
    });
    let ran = test(&host(&mail(&mails, CLEAR)));
    ran.exits(1)
        .says("the other recipients have it, but not: admin@example.com");
    assert_eq!(mails.received()[0].to, ["second@example.com"]);
    let mails = MailSink::with(MailOptions {
        unknown: &["admin@example.com", "second@example.com"],
        ..MailOptions::default()
    });
    let ran = test(&host(&mail(&mails, CLEAR)));
    ran.exits(1)
        .says("second@example.com: the server answered 550");
    assert_eq!(mails.received().len(), 0);
}

#[test]
fn a_recipient_who_is_put_off_gets_it_later_and_nobody_gets_it_twice() {
    let mails = MailSink::with(MailOptions {
        greylisted: &["second@example.com"],
        ..MailOptions::default()
    });
    test(&host(&mail(&mails, CLEAR))).exits(0);
    let received = mails.received();
    let to: Vec<_> = received.iter().map(|mail| mail.to.as_slice()).collect();
    assert_eq!(to, [["admin@example.com"], ["second@example.com"]]);
    let ids = received.iter().map(|mail| mail.header("Message-ID"));
    let ids: std::collections::BTreeSet<_> = ids.collect();
    assert_eq!(ids.len(), 1, "{ids:?}");
}

#[test]
fn what_one_recipient_refuses_the_others_hear_once_with_the_report() {
    let mails = MailSink::with(MailOptions {
        unknown: &["second@example.com"],
        ..MailOptions::default()
    });
    let host = host(&format!("report = \"always\"\n{}", mail(&mails, CLEAR)));
    fs::write(host.image("web01", "vda"), [7; 1 << 20]).unwrap();
    host.vmkeep(&["init", "--yes"], at()).exits(0);
    // No escrow is an alarm.
    host.vmkeep(&["-q", "run"], at())
        .exits(0)
        .says("but not: second@example.com");
    assert_eq!(mails.received().len(), 2, "the alarm and the report");
    let later = at() + jiff::SignedDuration::from_mins(1);
    host.vmkeep(&["run"], later).exits(0);
    assert_eq!(mails.received().len(), 3, "the report alone");
}

#[test]
fn who_could_not_be_told_is_an_error_that_quiet_does_not_hide() {
    let gone = HttpSink::start();
    let lines = format!("timeout = \"1s\"\n{}{}", webhook(&gone), ping(&gone));
    drop(gone);
    let host = host(&format!(
        "{lines}[[notify.webhook]]\nurl_file = \"/nonexistent\"\n"
    ));
    fs::write(host.image("web01", "vda"), [7; 1 << 20]).unwrap();
    host.vmkeep(&["init", "--yes"], at()).exits(0);
    let ran = host.vmkeep(&["-q", "run"], at());
    ran.exits(0)
        .says("not everything was told: webhook 127.0.0.1")
        .says("vmkeep: error: ping 127.0.0.1")
        .says("webhook 2 of the configuration: notify.webhook.url_file");
    assert_eq!(ran.stdout, "", "{ran}");
}

#[test]
fn a_terminal_that_is_to_have_no_colours_has_none() {
    let host = host("[[notify.webhook]]\nurl_file = \"/nonexistent\"\n");
    let shown = |no_color| {
        let command = format!(
            "VMKEEP_CONFIG={} NO_COLOR={no_color} {} run",
            path_text(&host.path("vmkeep.toml")),
            env!("CARGO_BIN_EXE_vmkeep")
        );
        support::tool("script", &["-qc", &command, "/dev/null"])
    };
    for (no_color, has_colours) in [("", true), ("1", false)] {
        let shown = shown(no_color);
        let error = ": webhook 1 of the configuration: ";
        assert!(shown.contains(error), "{shown}");
        assert_eq!(shown.contains('\u{1b}'), has_colours, "{shown:?}");
    }
}

#[test]
fn nobody_to_tell_is_said() {
    let ran = test(&host(""));
    ran.exits(2).one_error().says("no receiver is configured");
}

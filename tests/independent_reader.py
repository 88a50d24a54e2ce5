#!/usr/bin/env python3
"""A second reader of vmkeep repositories, built on nothing but the format specification.

It shares no code and no library with vmkeep: every byte it knows stands in the text of
`src/format/mod.rs`, whose section numbers it follows. Where the two readers disagree, one of them
or the text is wrong.

    independent_reader.py STORE IDENTITY CUSTOMER             checks everything, prints all live points
    independent_reader.py STORE IDENTITY CUSTOMER --to DIR    and writes DIR/<point>/<disk>.raw

STORE is a directory, IDENTITY an age identity file. Needs `age`, and the packages in
`independent_reader.txt`. Fails at the first thing that is not as specified.
"""

import base64
import hashlib
import json
import re
import subprocess
import sys
from pathlib import Path

import zstandard
from blake3 import blake3
from cryptography.exceptions import InvalidSignature, InvalidTag
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM


class Wrong(Exception):
    """Something is not as specified."""


def need(condition, what):
    if not condition:
        raise Wrong(what)


# 1. Conventions


def h(data):
    return blake3(data).digest()


def keyed(key, data):
    return blake3(data, key=key).digest()


def derive(context, key):
    return blake3(key, derive_key_context=context).digest()


def unhex(text, size):
    need(
        isinstance(text, str) and re.fullmatch(r"[0-9a-f]{%d}" % (2 * size), text), f"hex: {text!r}"
    )
    return bytes.fromhex(text)


NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,63}")
TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ")


def time_text(seconds):
    import datetime

    epoch = datetime.datetime(1970, 1, 1)
    return (epoch + datetime.timedelta(seconds=seconds)).strftime("%Y-%m-%dT%H:%M:%SZ")


class Fields:
    """Little-endian fields from the front."""

    def __init__(self, data):
        self.data = data
        self.at = 0

    def take(self, size):
        need(self.at + size <= len(self.data), "cut short")
        part = self.data[self.at : self.at + size]
        self.at += size
        return part

    def number(self, size, signed=False):
        return int.from_bytes(self.take(size), "little", signed=signed)

    def text(self):
        return self.take(self.number(4)).decode("utf-8")

    def end(self):
        need(self.at == len(self.data), "bytes after the end")


# 2. Objects


class Store:
    def __init__(self, root):
        self.root = Path(root)

    def read(self, name, limit):
        path = self.root / name
        need(path.stat().st_size <= limit, f"{name} is too large")
        return path.read_bytes()

    def exists(self, name):
        return (self.root / name).is_file()

    def list(self, prefix):
        base = self.root / prefix
        return sorted(str(p.relative_to(self.root)) for p in base.rglob("*") if p.is_file())


# 4. Keys


class Keys:
    def __init__(self, plain):
        match = re.fullmatch(
            rb"vmkeep customer key 1\ncustomer ([0-9a-f]{32})\ngeneration ([1-9][0-9]*)\nkey ([0-9a-f]{64})\n",
            plain,
        )
        need(match, "key file")
        self.uid = bytes.fromhex(match[1].decode())
        self.generation = int(match[2])
        secret = bytes.fromhex(match[3].decode())
        self.id_keys = [derive("vmkeep v1 chunk id key", secret)] + [
            derive(f"vmkeep v1 node id key height {height}", secret) for height in range(1, 7)
        ]
        self.tag_key = derive("vmkeep v1 tag key", secret)
        self.frame_key = derive("vmkeep v1 frame key", secret)
        self.record_key = derive("vmkeep v1 record key", secret)

    def id(self, kind, plain):
        return keyed(self.id_keys[kind], plain)

    def tag(self, id):
        return keyed(self.tag_key, id)[:16]


def open_gcm(key, sealed, aad):
    need(len(sealed) >= 28, "sealed piece is too short")
    try:
        return AESGCM(key).decrypt(sealed[:12], sealed[12:], aad)
    except InvalidTag:
        raise Wrong("does not open") from None


# 6. Frames

FRAME_HEADER = 44


def parse_frame(frame):
    fields = Fields(frame)
    kind = fields.number(1)
    flags = fields.number(1)
    need(kind <= 6 and flags <= 1 and fields.number(2) == 0, "frame header")
    tag = fields.take(16)
    plain_length = fields.number(4)
    sealed_length = fields.number(4)
    if kind == 0:
        need(1 <= plain_length <= 1 << 20, "plain length")
    else:
        need(plain_length % 32 == 0 and 32 <= plain_length <= 8192, "plain length")
    if flags:
        need(29 <= sealed_length <= plain_length + 27, "sealed length")
    else:
        need(sealed_length == plain_length + 28, "sealed length")
    checksum = fields.take(16)
    sealed = fields.take(sealed_length)
    fields.end()
    need(h(frame[:28] + sealed)[:16] == checksum, "frame checksum")
    return kind, flags, tag, plain_length, sealed


def open_frame(keys, frame, kind, id):
    found_kind, flags, tag, plain_length, sealed = parse_frame(frame)
    need(found_kind == kind and tag == keys.tag(id), "another frame")
    aad = bytes([kind, flags, 0, 0]) + plain_length.to_bytes(4, "little") + keys.uid + tag
    plain = open_gcm(keyed(keys.frame_key, id), sealed, aad)
    if flags:
        parameters = zstandard.get_frame_parameters(plain)
        need(parameters.content_size == plain_length and parameters.dict_id == 0, "zstd size")
        decompressor = zstandard.ZstdDecompressor().decompressobj()
        content = decompressor.decompress(plain)
        need(decompressor.eof and decompressor.unused_data == b"", "zstd end")
        plain = content
    need(len(plain) == plain_length, "plain length differs")
    need(keys.id(kind, plain) == id, "id differs")
    return plain


# 7. Packs


def check_pack(pack, session, object_hash):
    """Everything that can be said without a key. Returns the directory."""
    need(len(pack) <= 256 << 20 and h(pack) == object_hash, "pack hash")
    need(pack[:8] == b"VMKPACK1" and pack[-8:] == b"VMKPEND1", "pack magic")
    header = Fields(pack[8:48])
    header.number(4)
    kind = header.number(4)
    need(kind <= 1 and header.take(16) == session, "pack header")
    trailer = Fields(pack[-16:])
    start = trailer.number(4)
    count = trailer.number(4)
    need(start + 32 * count + 32 + 16 == len(pack), "pack trailer")
    directory = pack[start : start + 32 * count]
    need(h(pack[:48] + directory) == pack[start + 32 * count :][:32], "directory hash")
    fields = Fields(directory)
    rows = []
    following = 48
    for _ in range(count):
        tag = fields.take(16)
        offset = fields.number(4)
        length = fields.number(4)
        frame_kind = fields.number(1)
        need(fields.take(7) == bytes(7) and offset == following, "directory row")
        need((frame_kind > 0) == (kind == 1), "a pack of two kinds")
        following = offset + length
        frame = parse_frame(pack[offset:following])
        need(frame[0] == frame_kind and frame[2] == tag, "directory and frame differ")
        rows.append((tag, offset, length))
    need(following == start, "directory does not fit")
    return rows, kind


# 8. Index segments


def parse_segment(data, session, object_hash):
    need(len(data) <= 4 << 30 and h(data) == object_hash, "segment hash")
    fields = Fields(data)
    need(fields.take(8) == b"VMKINDX1" and fields.take(16) == session, "segment header")
    fields.take(16)
    record_count = fields.number(8)
    pack_count = fields.number(4)
    section_count = fields.number(4)
    first, last = fields.take(16), fields.take(16)
    need(section_count <= 32, "sections")
    sections = {}
    following = 88 + 24 * section_count
    kind_before = 0
    for _ in range(section_count):
        kind, reserved = fields.number(4), fields.number(4)
        offset, length = fields.number(8), fields.number(8)
        need(reserved == 0 and offset == following and offset + length <= len(data), "section")
        following = offset + length
        need(kind in (1, 2, 3) or kind >= 0x80000000, "unknown section")
        need(kind > kind_before, "section twice, or out of order")
        kind_before = kind
        sections[kind] = data[offset:following]
    need(following == len(data), "after the sections")
    need({1, 2, 3} <= set(sections), "a section is missing")
    need(len(sections[1]) == 64 * pack_count and len(sections[3]) == 28 * record_count, "lengths")
    packs = []
    rows = Fields(sections[1])
    for _ in range(pack_count):
        name = rows.take(16), rows.take(32)
        packs.append((name, rows.number(8), rows.number(4), rows.number(4)))
        need(packs[-1][1] <= 256 << 20 and packs[-1][3] <= 1, "pack row")
    slots = len(sections[2]) // 4
    need(len(sections[2]) in (1024, 262144), "fan-out")
    counts = [0] * slots
    records = []
    fields = Fields(sections[3])
    before = None
    for _ in range(record_count):
        tag = fields.take(16)
        pack, offset, length = fields.number(4), fields.number(4), fields.number(4)
        record = (tag, pack, offset, length)
        need(before is None or before < record, "segment order")
        need(first <= tag <= last and pack < pack_count, "record")
        need(offset >= 48 and offset + length <= packs[pack][1], "record outside of its pack")
        counts[tag[0] if slots == 256 else tag[0] << 8 | tag[1]] += 1
        records.append((tag, packs[pack][0], offset, length))
        before = record
    total = 0
    fan_out = Fields(sections[2])
    for count in counts:
        total += count
        need(fan_out.number(4) == total, "fan-out")
    return packs, records


# 9. Point records


def open_record(keys, point, data):
    need(len(data) <= 16 << 20 and data[:8] == b"VMKPOIN1", "point record")
    need(int.from_bytes(data[8:12], "little") == keys.generation, "generation of the record")
    key = keyed(keys.record_key, point)
    fields = Fields(open_gcm(key, data[12:], data[:12] + keys.uid + point))
    record = {"vm": fields.text()}
    record["kind"] = {0: "full", 1: "incremental"}[fields.number(1)]
    record["taken_at"] = time_text(fields.number(8, signed=True))
    record["disks"] = []
    for _ in range(fields.number(2)):
        disk = {
            "name": fields.text(),
            "size": fields.number(8),
            "chunk": fields.number(4),
            "root": fields.take(32),
            "mark": fields.text() or None,
        }
        need(NAME.fullmatch(disk["name"]), "disk name")
        need(disk["name"] not in [other["name"] for other in record["disks"]], "disk twice")
        need(1 <= disk["size"] <= 64 << 40, "disk size")
        need(disk["chunk"] in (65536, 131072, 262144, 524288, 1048576), "chunk size")
        record["disks"].append(disk)
    record["definition"] = None
    if {0: False, 1: True}[fields.number(1)]:
        name = fields.text()
        content = fields.take(fields.number(4))
        record["definition"] = {"file_name": name, "content": content}
    fields.end()
    return record


# 10. The ledger


def no_twins(pairs):
    need(len({key for key, _ in pairs}) == len(pairs), "a field stands twice")
    return dict(pairs)


def spell(value, top=True):
    """The one spelling: fields of the envelope in their order, all others sorted."""
    if top:
        order = ["vmkeep", "seq", "prev", "customer", "time", "clock", "host", "kind", "body"]
        need(list(value) == order, "fields of an entry")
        return "{" + ",".join(f'"{key}":{spell(value[key], False)}' for key in order) + "}"
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


TEXT, COUNT, LIST, OBJECT = str, int, list, dict
KINDS = {
    "genesis": {"format": COUNT, "repository": 16, "customer_name": TEXT, "host": "host"},
    "host": {"host": 32, "name": TEXT, "recipient": TEXT, "roles": LIST, "clock": TEXT},
    "policy": {"terms": OBJECT},
    "key": {"generation": COUNT, "object": COUNT, "hash": 32, "recipients": LIST},
    "begin": {
        "session": 16,
        "purpose": TEXT,
        "vm?": "name",
        "point?": 16,
        "expires_at?": "time",
        "deadline?": "time",
    },
    "commit": {
        "session": 16,
        "vm": "name",
        "point": 16,
        "record_hash": 32,
        "point_kind": TEXT,
        "base?": 16,
        "taken_at": "time",
        "expires_at": "time",
        "deadline": "time",
        "disks": LIST,
        "stored_bytes": COUNT,
        "pack_count": COUNT,
        "packs_hash": 32,
        "segments": "objects",
        "consistency": TEXT,
        "notes?": LIST,
        "audit?": "audit",
    },
    "abort": {"session": 16, "reason": TEXT},
    "expire": {"points": LIST},
    "undo": {"points": LIST},
    "erase": {"points": LIST},
    "merge": {"session": 16, "segments": "objects", "replaced": "objects", "dropped": "objects"},
    "condemn": {"session": 16, "packs": "objects", "segments": "objects"},
    "reclaimed": {
        "session?": 16,
        "marked_at": COUNT,
        "deleted": "objects",
        "marks": LIST,
        "certificate?": OBJECT,
        "destroyed": LIST,
    },
    "restore": {"point": 16, "vm": "name", "disks": LIST, "reason": TEXT},
    "verify": {"method": TEXT, "packs": "objects", "damaged": LIST},
    "clock": {"event": TEXT, "seq?": COUNT, "text": TEXT},
    "checkpoint": {"state_hash": 32},
}


def session_object(text):
    session, _, object_hash = text.partition("/")
    return unhex(session, 16), unhex(object_hash, 32)


def check_value(kind, value):
    if isinstance(kind, int):
        unhex(value, kind)
    elif kind == "name":
        need(NAME.fullmatch(value), "name")
    elif kind == "time":
        need(TIME.fullmatch(value), "time")
    elif kind == "objects":
        for name in value:
            session_object(name)
    elif kind == "host":
        check_body("host", value)
    elif kind == "audit":
        need(set(value) == {"against", "disks"}, "fields of an audit")
        unhex(value["against"], 16)
        for disk in value["disks"]:
            need(set(disk) == {"name", "differing_bytes"}, "fields of an audited disk")
            need(NAME.fullmatch(disk["name"]), "name of an audited disk")
            need(type(disk["differing_bytes"]) is int, "differing bytes")
    else:
        need(type(value) is kind, "type of a field")


def check_body(kind, body):
    """Raises if the entry is unknown to version 1."""
    need(kind in KINDS, f"unknown kind {kind}")
    known = KINDS[kind]
    for field in body:
        need(field in known or field + "?" in known, f"unknown field {field}")
    for field, form in known.items():
        name = field.rstrip("?")
        need(name in body or field.endswith("?"), f"field {name} is missing")
        if name in body:
            check_value(form, body[name])


class Ledger:
    """12. What the entries add up to."""

    def __init__(self, store, folder):
        self.store, self.folder = store, folder
        self.seq, self.hash = 0, bytes(32)
        self.uid = self.repository = self.customer_name = None
        self.hosts, self.keys = {}, []
        self.open, self.aborted, self.born = {}, set(), set()
        self.points, self.newest = {}, {}
        self.segments, self.condemned = set(), {}
        self.damaged, self.certificates, self.erasures = set(), [], {}
        self.void, self.unknown = [], []
        while store.exists(name := f"{folder}/ledger/{self.seq + 1:016}"):
            self.take(store.read(name, (1 << 20) + (16 << 10)))
        beyond = [name for name in store.list(f"{folder}/ledger") if re.search(r"/[0-9]{16}$", name) and int(name[-16:]) > self.seq]
        need(not beyond, f"a gap in the ledger: {beyond}")

    def take(self, data):
        lines = data.split(b"\n")
        need(len(lines) == 3 and lines[2] == b"", "two lines expected")
        line, signature = lines[0], unhex(lines[1].decode(), 64)
        text = line.decode("utf-8")
        entry = json.loads(text, object_pairs_hook=no_twins)
        need(entry.get("vmkeep") == 1, "version of an entry")
        need(spell(entry) == text, "spelling of an entry")
        try:
            key = Ed25519PublicKey.from_public_bytes(unhex(entry["host"], 32))
            key.verify(signature, b"vmkeep v1 ledger entry\n" + line)
        except InvalidSignature:
            raise Wrong(f"signature of entry {self.seq + 1}") from None
        need(entry["seq"] == self.seq + 1, "number of an entry")
        need(unhex(entry["prev"], 32) == self.hash, "the chain is broken")
        need(TIME.fullmatch(entry["time"]) and entry["clock"] in ("witnessed", "alone"), "time")
        uid = unhex(entry["customer"], 16)
        need(self.uid in (None, uid), "an entry of another customer")
        need(self.seq > 0 or entry["kind"] == "genesis", "the first entry is no genesis")
        self.uid = uid
        body = {key: value for key, value in entry["body"].items() if not key.startswith("x-")}
        self.seq, self.hash = self.seq + 1, h(data)
        try:
            check_body(entry["kind"], body)
        except (Wrong, KeyError, TypeError, AttributeError) as unknown:
            self.unknown.append((self.seq, str(unknown)))
            return
        try:
            self.check(entry, entry["kind"], body)
        except Wrong as void:
            self.void.append((self.seq, str(void)))
            if entry["kind"] == "commit" and body["session"] not in self.aborted:
                if body["point"] not in self.points:
                    self.adopt(body)
                    self.points[body["point"]] = dict(body, state="live", void=True)
            return
        self.apply(entry, entry["kind"], body)

    def check_segments(self, body):
        for name in body["segments"]:
            need(name.startswith(body["session"] + "/"), "a segment of another session")
            need(name not in self.segments, "a segment that is current")

    def check_session(self, entry, body, purpose):
        session = self.open.get(body["session"])
        need(session, "the session is not open")
        need(session["purpose"] == purpose, "purpose of the session")
        need(session["by"] == entry["host"], "the session of another host")
        return session

    def check_points(self, body, holds):
        points = [row["point"] for row in body["points"]]
        need(len(set(points)) == len(points), "a point twice")
        need(all(p in self.points and holds(self.points[p]) for p in points), "state of a point")

    def check(self, entry, kind, body):
        if kind == "genesis":
            need(self.seq == 1 and body["host"]["host"] == entry["host"], "genesis")
            return
        need(entry["host"] in self.hosts, "the host is not admitted")
        roles = set(self.hosts[entry["host"]]["roles"])

        def role(*any_of):
            need(roles & set(any_of), "no role for this")

        if kind in ("host", "key", "policy"):
            role("admin")
        elif kind == "begin":
            role("backup" if body["purpose"] == "backup" else "prune")
            need(body["purpose"] in ("backup", "reclaim", "merge", "prove"), "purpose")
            session = body["session"]
            need(
                session not in self.open and session not in self.aborted | self.born, "session used"
            )
            named = ("vm" in body, "point" in body)
            need(
                named == ((True, True) if body["purpose"] == "backup" else (False, False)),
                "vm, point",
            )
            if body["purpose"] == "backup":
                taken = [row.get("point") for row in self.open.values()]
                need(body["point"] not in self.points and body["point"] not in taken, "point id")
        elif kind == "commit":
            role("backup")
            session = self.check_session(entry, body, "backup")
            need((session["vm"], session["point"]) == (body["vm"], body["point"]), "another point")
            if "base" in body:
                need(self.newest.get(body["vm"]) == body["base"], "base is not the newest")
                need(self.points[body["base"]]["state"] == "live", "base is not live")
            need(session["time"] <= body["taken_at"] <= entry["time"], "taken_at")
            need(body["expires_at"] <= body["deadline"], "deadline")
            self.check_segments(body)
        elif kind == "abort":
            role("backup", "prune")
            need(body["session"] in self.open, "the session is not open")
        elif kind == "expire":
            role("prune")
            self.check_points(body, lambda p: p["state"] == "live")
        elif kind == "undo":
            role("prune")
            self.check_points(
                body, lambda p: p["state"] == "expired" and entry["time"] < p["expires_at"]
            )
        elif kind == "erase":
            role("prune")
            self.check_points(body, lambda p: p["state"] == "expired")
        elif kind == "merge":
            role("prune")
            self.check_session(entry, body, "merge")
            need(set(body["replaced"]) <= self.segments, "replaced")
            need(all(self.condemned.get(pack) == "deleted" for pack in body["dropped"]), "dropped")
            self.check_segments(body)
        elif kind == "condemn":
            role("prune")
            self.check_session(entry, body, "reclaim")
            need(not any(p.startswith(body["session"] + "/") for p in body["packs"]), "own packs")
            self.check_segments(body)
        elif kind == "reclaimed":
            role("prune")
            if "session" in body:
                self.check_session(entry, body, "prove")
            else:
                need("certificate" not in body, "a certificate without session")
            need(set(body["deleted"]) <= set(self.condemned), "deleted, not condemned")
            destroyed = body["destroyed"]
            need(len(set(destroyed)) == len(destroyed), "destroyed twice")
            need(
                all(self.points.get(p, {}).get("state") == "erased" for p in destroyed), "destroyed"
            )
        elif kind == "restore":
            role("restore", "admin")
        elif kind == "verify":
            role("backup", "restore", "prune")
        elif kind == "clock":
            if body["event"] == "trusted":
                role("prune", "admin")
            elif body["event"] == "void":
                role("admin")

    def adopt(self, body):
        self.open.pop(body["session"], None)
        self.born.add(body["session"])
        self.segments.update(body["segments"])

    def apply(self, entry, kind, body):
        if kind == "genesis":
            self.repository, self.customer_name = body["repository"], body["customer_name"]
            self.hosts[entry["host"]] = body["host"]
        elif kind == "host":
            self.hosts[body["host"]] = body
        elif kind == "key":
            self.keys.append(body)
        elif kind == "begin":
            self.open[body["session"]] = dict(body, by=entry["host"], time=entry["time"])
        elif kind == "commit":
            self.adopt(body)
            self.points[body["point"]] = dict(body, state="live", void=False)
            self.newest[body["vm"]] = body["point"]
        elif kind == "abort":
            del self.open[body["session"]]
            self.aborted.add(body["session"])
        elif kind in ("expire", "undo", "erase"):
            state = {"expire": "expired", "undo": "live", "erase": "erased"}[kind]
            for row in body["points"]:
                self.points[row["point"]]["state"] = state
                if kind == "erase":
                    self.erasures[row["point"]] = (entry["seq"], entry["time"])
        elif kind == "merge":
            self.segments -= set(body["replaced"])
            self.adopt(body)
            for pack in body["dropped"]:
                del self.condemned[pack]
        elif kind == "condemn":
            self.adopt(body)
            self.condemned.update({pack: "condemned" for pack in body["packs"]})
        elif kind == "reclaimed":
            if "session" in body:
                del self.open[body["session"]]
                self.aborted.add(body["session"])
            self.condemned.update({pack: "deleted" for pack in body["deleted"]})
            for point in body["destroyed"]:
                del self.points[point]
            if "certificate" in body:
                self.certificates.append(body["certificate"])
        elif kind == "verify":
            self.damaged.update((row["pack"], row["tag"]) for row in body["damaged"])


# 13. Certificates


def check_certificate(store, ledger, row):
    base = f"{ledger.folder}/certificates/{row['id']}.json"
    content, signature = store.read(base, 64 << 20), store.read(base + ".minisig", 1 << 16)
    need(
        h(content).hex() == row["hash"] and h(signature).hex() == row["signature_hash"],
        "certificate",
    )
    certificate = json.loads(content)
    need(certificate["vmkeep_deletion_certificate"] == 1, "version of a certificate")
    host = unhex(certificate["issued_by"], 32)
    need(certificate["issued_by"] in ledger.hosts, "certificate of a stranger")
    for point in certificate["erased"] + certificate["destroyed"]:
        seq, time = ledger.erasures[point["point"]]
        told = (point["erase_entry"], point.get("erased_at", time))
        need(told == (seq, time) and time <= certificate["issued_at"], "when a point was erased")
    lines = signature.decode("ascii").split("\n")
    need(len(lines) == 5 and lines[4] == "", "signature file")
    need(lines[0].startswith("untrusted comment: "), "untrusted comment")
    need(lines[2].startswith("trusted comment: "), "trusted comment")
    blob = base64.b64decode(lines[1], validate=True)
    need(blob[:2] == b"ED" and blob[2:10] == h(host)[:8] and len(blob) == 74, "signature line")
    key = Ed25519PublicKey.from_public_bytes(host)
    key.verify(blob[10:], hashlib.blake2b(content).digest())
    comment = lines[2][len("trusted comment: ") :].encode()
    key.verify(base64.b64decode(lines[3], validate=True), blob[10:] + comment)


# 15, 16. Reading and restoring


class Repository:
    def __init__(self, root, identity, customer):
        store = self.store = Store(root)
        about = json.loads(store.read("vmkeep.json", 1 << 16))
        need(about["format"] == 1 and about["features"] == [], "vmkeep.json")
        self.folder = f"customers/{customer}"
        ledger = self.ledger = Ledger(store, self.folder)
        need(ledger.seq > 0, "no ledger")
        need(ledger.repository == about["repository"], "another repository")
        need(ledger.customer_name == customer, "another customer")
        self.keys = self.find_key(identity)
        self.places = {}
        self.packs = {}
        for name in ledger.segments:
            session, object_hash = session_object(name)
            data = store.read(f"{self.folder}/index/{name}", 4 << 30)
            packs, records = parse_segment(data, session, object_hash)
            for pack, *row in packs:
                self.packs[f"{pack[0].hex()}/{pack[1].hex()}"] = row
            for tag, pack, offset, length in records:
                place = (f"{pack[0].hex()}/{pack[1].hex()}", offset, length)
                self.places.setdefault(tag, set()).add(place)

    def find_key(self, identity):
        for row in reversed(self.ledger.keys):
            name = f"{self.folder}/key/{row['object']}.age"
            data = self.store.read(name, 1 << 18)
            need(h(data).hex() == row["hash"], "key file is another")
            opened = subprocess.run(["age", "-d", "-i", identity], input=data, capture_output=True)
            if opened.returncode == 0:
                keys = Keys(opened.stdout)
                need(keys.uid == self.ledger.uid, "key of another customer")
                return keys
        raise Wrong("no key file opens with this identity")

    def worth(self, tag, place):
        """Order of places: sound, then condemned or damaged, then deleted."""
        pack = place[0]
        state = self.ledger.condemned.get(pack)
        doubtful = state is not None or (pack, tag.hex()) in self.ledger.damaged
        return (state == "deleted", doubtful, place)

    def open(self, kind, id):
        tag = self.keys.tag(id)
        problems = ["no place"]
        for place in sorted(self.places.get(tag, ()), key=lambda place: self.worth(tag, place)):
            name, offset, length = place
            try:
                need(length <= FRAME_HEADER + 28 + (1 << 20), "length of a frame")
                with open(self.store.root / self.folder / "packs" / name, "rb") as pack:
                    pack.seek(offset)
                    frame = pack.read(length)
                return open_frame(self.keys, frame, kind, id)
            except (OSError, Wrong) as problem:
                problems.append(f"{name}: {problem}")
        raise Wrong(f"tag {tag.hex()}: {'; '.join(problems)}")

    def chunks(self, disk):
        """5. Yields (offset, bytes) of every chunk that is not a hole."""
        size, chunk = disk["size"], disk["chunk"]
        counts = [-(-size // chunk)]
        while counts[-1] > 1 or len(counts) == 1:
            counts.append(-(-counts[-1] // 256))

        def walk(height, index, id):
            if id == bytes(32):
                return
            plain = self.open(height, id)
            if height == 0:
                need(len(plain) == min(chunk, size - index * chunk), "length of a chunk")
                yield index * chunk, plain
                return
            children = min(256, counts[height - 1] - 256 * index)
            need(len(plain) == 32 * children and any(plain), "children of a node")
            for child in range(children):
                yield from walk(height - 1, 256 * index + child, plain[32 * child :][:32])

        yield from walk(len(counts) - 1, 0, disk["root"])

    def live(self):
        return {
            p: row
            for p, row in self.ledger.points.items()
            if row["state"] == "live" and not row["void"]
        }

    def restore(self, point, folder):
        row = self.live()[point]
        data = self.store.read(f"{self.folder}/points/{point}", 16 << 20)
        need(h(data).hex() == row["record_hash"], "point record is another")
        record = open_record(self.keys, unhex(point, 16), data)
        need(
            (record["vm"], record["kind"], record["taken_at"])
            == (row["vm"], row["point_kind"], row["taken_at"]),
            "record and commit differ",
        )
        need(
            [(d["name"], d["size"]) for d in record["disks"]]
            == [(d["name"], d["size_bytes"]) for d in row["disks"]],
            "disks differ",
        )
        disks = []
        for disk in record["disks"]:
            content = bytearray(disk["size"])
            for offset, plain in self.chunks(disk):
                content[offset : offset + len(plain)] = plain
            if folder:
                (folder / point).mkdir(parents=True, exist_ok=True)
                (folder / point / f"{disk['name']}.raw").write_bytes(content)
            disks.append(
                {
                    "name": disk["name"],
                    "size_bytes": disk["size"],
                    "chunk_bytes": disk["chunk"],
                    "mark": disk["mark"],
                    "blake3": h(bytes(content)).hex(),
                }
            )
        definition = record["definition"]
        if definition:
            definition = dict(definition, content=definition["content"].decode("utf-8"))
        return {
            "point": point,
            "vm": record["vm"],
            "kind": record["kind"],
            "taken_at": record["taken_at"],
            "disks": disks,
            "definition": definition,
        }

    def check_packs(self):
        """Every pack that must exist, without the key; the index must list exactly what they hold."""
        found = set()
        for name, (size, frames, kind) in self.packs.items():
            if self.ledger.condemned.get(name) == "deleted":
                continue
            session, object_hash = session_object(name)
            pack = self.store.read(f"{self.folder}/packs/{name}", 256 << 20)
            rows, found_kind = check_pack(pack, session, object_hash)
            need(
                (len(pack), len(rows), found_kind) == (size, frames, kind), "pack row of the index"
            )
            found.update((tag, (name, offset, length)) for tag, offset, length in rows)
        indexed = {(tag, place) for tag, places in self.places.items() for place in places}
        need(found == indexed, "the index does not list what the packs hold")


def main(arguments):
    folder = None
    if "--to" in arguments:
        at = arguments.index("--to")
        folder = Path(arguments[at + 1])
        del arguments[at : at + 2]
    root, identity, customer = arguments
    repository = Repository(root, identity, customer)
    repository.check_packs()
    for row in repository.ledger.certificates:
        check_certificate(repository.store, repository.ledger, row)
    report = {
        "entries": repository.ledger.seq,
        "void": repository.ledger.void,
        "unknown": repository.ledger.unknown,
        "certificates": len(repository.ledger.certificates),
        "points": [repository.restore(point, folder) for point in sorted(repository.live())],
    }
    json.dump(report, sys.stdout, indent=2, sort_keys=True)
    print()


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (Wrong, InvalidSignature, OSError, ValueError, KeyError) as error:
        sys.exit(f"independent_reader: {type(error).__name__}: {error}")

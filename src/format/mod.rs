//! The format of a repository, version 1. This text is the specification: a reader in another language
//! can be written from it alone. One stands in `tests/independent_reader.py` and is held against it.
//!
//! What is absent from the code of this module: keys and ciphers (`codec` has them, and the layouts
//! that carry ids), the meaning of a ledger (`repository`), any store.
//!
//! Sections: conventions (1) · objects (2) · `vmkeep.json` (3) · keys (4) · disks as hash trees (5) ·
//! frames (6) · packs (7) · index segments (8) · point records (9) · the ledger (10), its kinds of
//! entries (11), when one is valid (12) · certificates (13) · order of writing (14) · reading (15) ·
//! restoring a disk from nothing (16) · limits (17) · what is protected (18) · worked example (19).
//!
//! # 1. Conventions
//!
//! - Integers are unsigned and little-endian; `i64` is two's complement. *Offset* and *size* are in bytes.
//! - `A ‖ B` is concatenation. A *text* in a binary layout is a `u32` length and as many bytes of UTF-8.
//! - `BLAKE3(m)` is the hash of 32 bytes; `BLAKE3-keyed(k, m)` its keyed mode with a key of 32 bytes;
//!   `BLAKE3-derive(c, k)` its mode for key derivation with the context string `c` (ASCII, as printed
//!   here) and the key material `k`. The first 16 bytes of an output are its *truncation* to 16.
//! - `AES-256-GCM(key, nonce, aad, plain)`: nonce of 12 bytes, result `ciphertext ‖ GCM tag of 16`.
//! - Names in hexadecimal are lower-case, always of full length: 16 bytes are 32 digits, 32 bytes 64.
//! - A time is UTC in whole seconds, `2026-11-21T22:00:00Z`, in no other spelling. In binary layouts it
//!   is an `i64` of seconds since 1970-01-01T00:00:00Z, without leap seconds.
//! - Everything is refused that is not as described here: other values in reserved fields, lengths
//!   that lie, bytes after the end. A length is compared with its limit before memory is taken for it.
//!
//! | name | bytes | is |
//! |---|---|---|
//! | repository id, customer uid, session id, point id, installation id | 16 | random |
//! | host id | 32 | Ed25519 public key of a host |
//! | tag | 16 | lookup name of a chunk or node |
//! | object hash, entry hash | 32 | BLAKE3 of a whole stored object |
//! | *id* | 32 | names *and opens* a chunk or node; secret; stands only in nodes and point records |
//!
//! Names of customers, VMs and disks are 1 to 64 bytes of `A-Z a-z 0-9 . - _`, the first not `.` or `-`.
//!
//! # 2. Objects
//!
//! An object is a sequence of bytes under a name. It is created only if the name is free, never changed,
//! and no name is used twice. In a directory the name is the path below the root; the first parts `tmp`
//! and `reserve` are the store's own and hold no objects. In a bucket the name is the key below a prefix.
//!
//! ```text
//! vmkeep.json                                  what the repository is
//! customers/<customer name>/
//!     key/<n>.age                              the customer key, sealed for hosts and escrow; n from 1
//!     ledger/<seq as 16 decimal digits>        entries 1, 2, 3 …
//!     packs/<session id>/<object hash>         sealed chunks or nodes
//!     index/<session id>/<object hash>         where each tag stands
//!     points/<point id>                        a restore point: the roots of its disks
//!     certificates/<id>.json                   a deletion certificate
//!     certificates/<id>.json.minisig           its signature
//!     probe/…                                  tests of the store; carry nothing
//!     probe/spent/…                            of hosts that delete nothing; a sweep may, at any time
//! ```
//!
//! Numbers have no leading zeros in `key/`, and exactly 16 digits in `ledger/`. Customers share nothing.
//! In a repository that one host writes (section 14.1) an entry is `ledger/<seq>/<entry hash>`.
//! An object under any other name is no part of the repository. What a *listing* shows decides nothing:
//! what exists is said by the ledger.
//!
//! # 3. `vmkeep.json`
//!
//! A JSON object, at most 64 KiB. Readers ignore fields that they do not know.
//!
//! | field | is |
//! |---|---|
//! | `format` | 1. A reader refuses any other number |
//! | `repository` | repository id |
//! | `created_at` | time, for people |
//! | `chunk_bytes` | default chunk size for new disks: a power of two, 65536 to 1048576 |
//! | `features` | list of texts, each an ability that every program needs; version 1 knows `one-writer` (14.1), and a reader refuses any other |
//!
//! It is not signed. The genesis entry of each customer names the repository too, and must agree.
//!
//! # 4. Keys
//!
//! ## 4.1 The customer key
//!
//! 32 random bytes, the *secret* of a customer. It is stored only as the plaintext of `key/<n>.age`, in
//! exactly this spelling, four lines, each ended by a line feed:
//!
//! ```text
//! vmkeep customer key 1
//! customer <customer uid>
//! generation <decimal, from 1, no leading zeros>
//! key <the 32 bytes in hexadecimal>
//! ```
//!
//! The file is in the age format, version 1 (age-encryption.org/v1, <https://age-encryption.org/v1>),
//! binary, not armoured, with X25519 recipients: the host and every escrow recipient. At most 64 stanzas,
//! 64 KiB of header and one chunk (64 KiB) of plaintext. `age -d -i IDENTITY key/1.age` opens it. The
//! `key` entry of the ledger (section 11) has the BLAKE3 of the file. The generation is 1 until a key is
//! changed; objects under a changed key say its generation, and a program has a key of that generation
//! or does not open them.
//!
//! ## 4.2 What follows from it
//!
//! With `S` the secret:
//!
//! | key | is | used for |
//! |---|---|---|
//! | chunk id key | `BLAKE3-derive("vmkeep v1 chunk id key", S)` | ids of chunks |
//! | node id key, height *h* | `BLAKE3-derive("vmkeep v1 node id key height h", S)`, *h* one digit, 1 to 6 | ids of nodes |
//! | tag key | `BLAKE3-derive("vmkeep v1 tag key", S)` | tags |
//! | frame key | `BLAKE3-derive("vmkeep v1 frame key", S)` | frames |
//! | record key | `BLAKE3-derive("vmkeep v1 record key", S)` | point records |
//!
//! ```text
//! id of a chunk     = BLAKE3-keyed(chunk id key, plaintext)
//! id of a node      = BLAKE3-keyed(node id key of its height, plaintext)
//! tag of an id      = first 16 bytes of BLAKE3-keyed(tag key, id)
//! cipher key of a chunk or node = BLAKE3-keyed(frame key, id)
//! cipher key of a point record  = BLAKE3-keyed(record key, point id)
//! ```
//!
//! A cipher key of a frame belongs to one plaintext only, and one of a record to one record. So a nonce
//! that came twice by chance would reveal nothing but that the same piece was sealed twice.
//!
//! ## 4.3 Hosts
//!
//! A host has one secret, an X25519 identity in an age identity file (`AGE-SECRET-KEY-1…`; `#` comments
//! and empty lines mean nothing; exactly one identity). It opens key files. The key that signs follows
//! from it: the 32 bytes of the secret, as the Bech32 text holds them (not clamped), give
//!
//! ```text
//! Ed25519 seed = BLAKE3-derive("vmkeep v1 host signing seed", the 32 bytes)
//! ```
//!
//! The seed is the private key of RFC 8032; the public key is the host id.
//!
//! # 5. Disks as hash trees
//!
//! A disk has a size (1 byte to 64 TiB, any number of bytes) and a chunk size (a power of two, 65536 to
//! 1048576). Chunk *i* is the bytes from `i × chunk size`; the last chunk is as short as the disk ends,
//! and is *not* padded. With `c` the number of chunks (size ÷ chunk size, rounded up):
//!
//! - the *height* of the tree is the smallest `h ≥ 1` with `c ≤ 256^h` (so one node stands even above a
//!   single chunk);
//! - nodes of height 1 have chunks as children, nodes of height *h* > 1 nodes of height *h* − 1. Node *k*
//!   of a height has the children `256·k` to `256·k + 255` of the level below, as far as they exist: the
//!   last node of a level is short. The one node at the height of the tree is the *root*.
//!
//! The plaintext of a node is the ids of its children in order, 32 bytes each; 32 zero bytes stand for a
//! *hole*. A chunk of zeros is always a hole, whatever the source said of it, and so is a node whose
//! children are all holes: neither is ever stored, and a node of nothing but holes is refused. Hence the
//! id of the root, the disk size and the chunk size name the content: equal disks have equal roots. If
//! the whole disk is zero the root itself is the hole.
//!
//! # 6. Frames
//!
//! A chunk or node is stored as a frame:
//!
//! | offset | size | field |
//! |---|---|---|
//! | 0 | 1 | kind: 0 chunk, 1 to 6 node of that height |
//! | 1 | 1 | flags: bit 0 compressed; the others 0 |
//! | 2 | 2 | 0 |
//! | 4 | 16 | tag |
//! | 20 | 4 | plain length: 1 to 1048576 for a chunk, a multiple of 32 from 32 to 8192 for a node |
//! | 24 | 4 | sealed length: length of the sealed piece |
//! | 28 | 16 | checksum: first 16 bytes of BLAKE3(bytes 0 to 27 ‖ sealed piece) |
//! | 44 | | sealed piece: nonce (12 random bytes) ‖ ciphertext ‖ GCM tag (16) |
//!
//! The checksum finds damage without a key; it proves nothing about who wrote the frame. The sealed
//! piece is `AES-256-GCM(cipher key, nonce, aad, content)` with this associated data of 40 bytes:
//!
//! | offset | size | field |
//! |---|---|---|
//! | 0 | 1 | kind |
//! | 1 | 1 | flags |
//! | 2 | 2 | 0 |
//! | 4 | 4 | plain length |
//! | 8 | 16 | customer uid |
//! | 24 | 16 | tag |
//!
//! If the flag *compressed* is clear, the content is the plaintext and the sealed length is the plain
//! length plus 28. If it is set, the content is one frame of zstd (RFC 8878): it declares its content size, which
//! is the plain length; it is shorter than the plaintext; no dictionary; no second or skippable frame and
//! no byte after it. Sealed length is then 29 to plain length + 27. A reader checks the declared size
//! and the end of the zstd frame before it decompresses, into exactly plain length bytes.
//!
//! After opening, the id is computed again from the plaintext and must be the one that was asked for.
//! This is the commitment to the key (AES-GCM alone has none) and finds faults of memory and compressor.
//!
//! # 7. Packs
//!
//! Frames of one kind of pack, without gap: data packs (0) hold chunks only, node packs (1) nodes only.
//! At most 256 MiB.
//!
//! | offset | size | field |
//! |---|---|---|
//! | 0 | 8 | `VMKPACK1` |
//! | 8 | 4 | generation of the customer key |
//! | 12 | 4 | kind of pack: 0 data, 1 node |
//! | 16 | 16 | session id: that of the object's name |
//! | 32 | 16 | random: no two packs are equal, so no name recurs |
//! | 48 | | frames, one after the other |
//! | *d* | 32·*n* | directory: one row a frame, in their order |
//! | *d* + 32·*n* | 32 | BLAKE3(bytes 0 to 47 ‖ directory) |
//! | *d* + 32·*n* + 32 | 4 | *d*: offset of the directory |
//! | | 4 | *n*: number of frames |
//! | | 8 | `VMKPEND1`, the last bytes of the pack |
//!
//! A row of the directory:
//!
//! | offset | size | field |
//! |---|---|---|
//! | 0 | 16 | tag |
//! | 16 | 4 | offset of the frame in the pack |
//! | 20 | 4 | length of the frame, with its header of 44 bytes |
//! | 24 | 1 | kind of the frame |
//! | 25 | 7 | 0 |
//!
//! The first row's offset is 48, each other one is the end of the row before, and the last frame ends at
//! *d*. The pack is named by its session and the BLAKE3 of all its bytes. So the last 16 bytes lead to the
//! directory, one more read gets it, and the index can be made again from packs alone.
//!
//! # 8. Index segments
//!
//! An index segment says where tags stand. It is named by its session and the BLAKE3 of its bytes. At
//! most 4 GiB.
//!
//! | offset | size | field |
//! |---|---|---|
//! | 0 | 8 | `VMKINDX1` |
//! | 8 | 16 | session id: that of the object's name |
//! | 24 | 16 | random |
//! | 40 | 8 | *r*: number of records |
//! | 48 | 4 | *p*: number of packs |
//! | 52 | 4 | *s*: number of sections, at most 32 |
//! | 56 | 16 | first tag of the range that it covers |
//! | 72 | 16 | last tag of that range, inclusive |
//! | 88 | 24·*s* | section table |
//! | | | the sections in the order of the table, without gap, up to the end of the segment |
//!
//! A row of the section table is kind (`u32`), 0 (`u32`), offset (`u64`), length (`u64`). Kinds 1, 2 and 3
//! stand exactly once each, and the sections in the ascending order of their kinds, so that one pass
//! from the first byte to the last can check all of it. Kinds from 0x80000000 on may be skipped by who
//! does not know them (a filter, say; version 1 defines none); any other kind is refused. A session with
//! many records writes several segments of the same packs, each for a range of tags, no two ranges with
//! a tag in common; what is in no range is in none of them. One segment covers all tags (zeros to 0xff…ff).
//!
//! **1, packs**, *p* rows of 64 bytes: session id (16), object hash (32), size of the pack in bytes
//! (`u64`), number of frames (`u32`), kind of pack (`u32`). **2, fan-out**, 256 or 65536 numbers of 4 bytes:
//! the number at slot *k* is how many records have a tag whose first byte (of 65536: whose first two
//! bytes, most significant first) is at most *k*. **3, records**, *r* rows of 28 bytes, ascending, no two
//! equal, by (tag as bytes, pack, offset, length):
//!
//! | offset | size | field |
//! |---|---|---|
//! | 0 | 16 | tag |
//! | 16 | 4 | pack: row of this segment's pack section, from 0 |
//! | 20 | 4 | offset of the frame in the pack, at least 48 |
//! | 24 | 4 | length of the frame, with its header |
//!
//! Frames end within their pack. One tag may have several records: several copies, all of equal worth. In
//! theory also two ids of one tag: then only one opens. A reader tries all.
//!
//! # 9. Point records
//!
//! `points/<point id>`, at most 16 MiB:
//!
//! | offset | size | field |
//! |---|---|---|
//! | 0 | 8 | `VMKPOIN1` |
//! | 8 | 4 | generation of the customer key |
//! | 12 | 12 | nonce, random |
//! | 24 | | ciphertext ‖ GCM tag (16) |
//!
//! Sealed with `AES-256-GCM(cipher key of the point, nonce, aad, plaintext)`, where the associated data is
//! bytes 0 to 11 ‖ customer uid (16) ‖ point id (16). The plaintext:
//!
//! | field | form |
//! |---|---|
//! | VM name | text |
//! | kind | `u8`: 0 full, 1 incremental |
//! | taken at | `i64` |
//! | number of disks | `u16` |
//! | per disk: name | text; no two alike |
//! | size in bytes | `u64` |
//! | chunk size | `u32` |
//! | id of the root | 32 bytes; zeros: the whole disk is a hole |
//! | mark | text, may be empty: what the source wants to see again at the next capture |
//! | definition follows | `u8`: 0 no, 1 yes |
//! | if yes: file name | text. Not to be trusted as a path |
//! | content | `u32` length, then so many bytes |
//!
//! It is the only place where the ids of roots stand. Destroying it destroys, at that moment, the
//! readability of everything that no other point reaches.
//!
//! # 10. The ledger
//!
//! Entries numbered from 1, without gap. An entry is two lines, each ended by one line feed: a JSON object,
//! and the Ed25519 signature in 128 hexadecimal digits. The line of JSON has at most 1 MiB; a reader
//! accepts objects of up to 1 MiB + 16 KiB.
//!
//! ```text
//! {"vmkeep":1,"seq":N,"prev":"…","customer":"…","time":"…","clock":"…","host":"…","kind":"…","body":{…}}
//! <signature>
//! ```
//!
//! | field | is |
//! |---|---|
//! | `vmkeep` | 1; any other number is of another version, and nothing more can be said of the entry |
//! | `seq` | its number, that of its name |
//! | `prev` | BLAKE3 of the whole stored entry before it (both lines); 64 zeros in entry 1 |
//! | `customer` | customer uid: the same in all entries |
//! | `time` | when it was written |
//! | `clock` | `witnessed`: two sources agreed on the time; `alone`: one clock said so |
//! | `host` | host id of the signer |
//! | `kind`, `body` | section 11 |
//!
//! The signature is over the 23 bytes `vmkeep v1 ledger entry` ‖ line feed, then the line of JSON without
//! its line feed. It must be that of `host`, even where the entry is void.
//!
//! **One spelling.** No spaces; the fields above in this order; in `body`, and in every object in it, keys
//! in ascending order of their bytes; integers in plain decimal; strings escape `"` and `\` with a
//! backslash, the control characters 8, 9, 10, 12, 13 as `\b \t \n \f \r`, other characters below 32 as
//! `\u00` and two lower-case digits, and nothing else (other characters stand as UTF-8). Integers go up to
//! 2^64 − 1 and must be read exactly. An entry in any
//! other spelling is refused, in particular one that has a field twice: two readers must not see two
//! entries in the same signed bytes. Absent fields are left out, never `null`.
//!
//! **A chain that breaks is damage**: a missing number below an object named as a higher one, a wrong signature, spelling,
//! `prev`, `customer` or `seq`, a first entry that is not `genesis`. Nothing after it is looked at. An
//! entry that is sound and breaks a rule of section 12 is *void* instead: it stays in the chain and has no
//! effect, with one exception (12.3). That a ledger was cut off at its end can be noticed only by who
//! remembers a later entry; hosts do.
//!
//! **Unknown things.** An entry of an unknown kind, with an unknown field, or with a field that is not as
//! described, is *unknown*: it has no effect, and from then on a program of this version may read and must
//! not write (neither entries nor objects; nor may it delete). Fields of a body whose names begin with
//! `x-` may be skipped by who does not know them; only the outermost fields of a body.
//!
//! # 11. Kinds of entries
//!
//! `?` marks fields that may be absent. Lists may be empty. A *pack name* or *segment name* is
//! `<session id>/<object hash>`. Reasons and texts are for people, free UTF-8.
//!
//! | kind | field | is |
//! |---|---|---|
//! | `genesis` | `format` | 1 |
//! | | `repository` | repository id |
//! | | `customer_name` | the folder's name |
//! | | `host` | an object with the fields of a `host` body: the signer |
//! | | `writers`? | `one`: section 14.1; left out where many may write |
//! | `host` | `host`, `name` | host id; a name for people |
//! | | `recipient` | its age recipient, `age1…` |
//! | | `roles` | list of `backup`, `restore`, `prune`, `admin`. Replaces earlier roles of this host; empty: it may do nothing |
//! | | `clock` | `verified`, or `trusted`: the operator declares the host's clock disciplined |
//! | `policy` | `terms` | object of texts: `timezone`, `window`, `full_day`, `restore_window`, `max_retention`, `keep_after_window`, `erase_budget`? as in the configuration file |
//! | `key` | `generation` | of the customer key in the file |
//! | | `object` | *n* of `key/<n>.age` |
//! | | `hash` | BLAKE3 of that object |
//! | | `recipients` | age recipients that open it |
//! | `begin` | `session` | session id, never used before |
//! | | `purpose` | `backup`, `reclaim`, `merge`, `prove` |
//! | | `vm`?, `point`? | with `backup`, and only there: the VM, and the point id it may commit |
//! | | `expires_at`?, `deadline`? | with `backup`: those that a point taken at this entry's time would have. For reading they mean nothing |
//! | `commit` | `session`, `vm`, `point` | as its `begin` said |
//! | | `record_hash` | BLAKE3 of the stored point record |
//! | | `point_kind` | `full` or `incremental` |
//! | | `base`? | point id that an incremental was built on. For reading it means nothing |
//! | | `taken_at` | instant of the capture |
//! | | `expires_at`, `deadline` | when it leaves the list; when its last byte must be gone |
//! | | `disks` | list of objects `name`, `size_bytes` |
//! | | `stored_bytes` | what the session wrote |
//! | | `pack_count`, `packs_hash` | number of packs written; BLAKE3 of their names, sorted by (session, hash), each followed by a line feed |
//! | | `segments` | segment names; their pack sections are the session's packs |
//! | | `consistency` | what the instant shows: `image` (stopped VM), `crash` (running, as after a loss of power) or `filesystem` (running, file systems frozen by the guest agent) |
//! | | `notes`? | list of texts; left out when empty |
//! | | `audit`? | with `full`: object `against` (point id), `disks` (list of objects `name`, `differing_bytes`): 12.6. For reading it means nothing |
//! | `abort` | `session`, `reason` | |
//! | `expire`, `undo`, `erase` | `points` | list of objects `point`, `reason` |
//! | `merge` | `session` | |
//! | | `segments`, `replaced` | new segments; those that they stand for from now on |
//! | | `dropped` | deleted packs that no current segment lists any more |
//! | `condemn` | `session` | |
//! | | `packs` | packs that nothing may rely on any more |
//! | | `segments` | of the survivors, which the session wrote anew |
//! | `reclaimed` | `session`? | a `prove` session, which this entry closes |
//! | | `marked_at` | the mark saw the ledger up to this number |
//! | | `deleted` | packs that are gone from the store |
//! | | `marks` | list of objects `pack`, `dead_bytes`, `earliest_deadline`, `erases` (numbers of `erase` entries whose points may have left these bytes): packs whose dead bytes are news; none dead: the pack's row goes |
//! | | `certificate`? | object `id`, `hash`, `signature_hash`: BLAKE3 of the certificate and of its signature file |
//! | | `destroyed` | point ids: erased points of which no byte is left |
//! | `restore` | `point`, `vm`, `disks`, `reason` | evidence |
//! | `verify` | `method` | `checksum`: every frame's checksum; `opened`: every frame opened with the key |
//! | | `packs` | packs that were whole |
//! | | `damaged` | list of objects `pack`, `tag`: frames that nothing may rely on |
//! | `clock` | `event` | `refused` (a deletion was), `trusted` (an operator vouched), `void` |
//! | | `seq`? | with `void`: the entry whose time is wrong; with `trusted`: the entry from which on the signer's clock went on as its uptime did |
//! | | `text` | |
//! | `seal` | `installation` | installation id of the process that wrote it: section 14.1 |
//! | `checkpoint` | `state_hash` | reserved; no program of version 1 writes it and it has no effect |
//!
//! The names `drill`, `hold`, `grant` and `offboard` are set aside for later versions: unknown kinds today.
//!
//! # 12. When an entry is valid
//!
//! Validity depends on the entries before and the version only: never on a clock, a configuration or the
//! presence of objects. (One seam: `policy` needs the named time zone in the program's IANA table.)
//!
//! ## 12.1 State
//!
//! Hosts with roles · keys · policy · *open* sessions (host, purpose, VM, point, time of `begin`) ·
//! *aborted* sessions · *born* sessions (time) · points (all fields of the commit, state `live`, `expired`
//! or `erased`, void or not) · newest committed point of each VM · *current* segments · condemned packs
//! (deleted or not) · marks · verified packs and damaged frames · witnessed times · suspect points and
//! disks whose tracking is distrusted.
//!
//! ## 12.2 Rules
//!
//! Every entry but `genesis` is of an admitted host. The columns: roles of which the signer has one; what
//! else must hold; what it does.
//!
//! | kind | role | holds | does |
//! |---|---|---|---|
//! | `genesis` | | entry 1; names its signer as `host` | admits it; a `format` above 1 forbids writing |
//! | `host` | admin | where one host writes: `host` is the signer | admits, or replaces roles |
//! | `key` | admin | | adds a key file |
//! | `policy` | admin | the terms can be understood and kept | sets the policy; expiry and deadline of existing points only become earlier (12.4) |
//! | `begin` | backup for `backup`, else prune | the session was never open, aborted or born; with `backup`: VM and point are named, no point or open session has this point id; else neither is named | opens the session |
//! | `commit` | backup | 12.3 | the session is born; its segments are current; the point is live and the VM's newest |
//! | `abort` | backup or prune | the session is open | it is aborted |
//! | `expire` | prune | all points live, none twice | expired |
//! | `undo` | prune | all expired, none twice, and the entry's time is before each `expires_at` | live |
//! | `erase` | prune | all expired, none twice | erased |
//! | `merge` | prune | session open, of this host, purpose `merge`; `replaced` are current; `dropped` are condemned and deleted, and every open session began after their (latest) `condemn`; segments are new and of the session | `replaced` are no longer current; `segments` are; `dropped` are forgotten; the session is born |
//! | `condemn` | prune | session open, of this host, purpose `reclaim`; no pack is the session's own; segments are new and of the session | packs are condemned; segments current; the session is born |
//! | `reclaimed` | prune | a session, if named, is open, of this host, purpose `prove`; a certificate needs a session; `deleted` were condemned; `destroyed` are erased, none twice | packs are deleted; `marks` are taken in (12.5); destroyed points are forgotten; the session is over |
//! | `restore` | restore or admin | | |
//! | `verify` | backup, restore or prune | | notes when packs were whole; damaged frames |
//! | `clock` | `refused` any; `trusted` prune or admin; `void` admin | | `void`: the time of entry `seq` is not witnessed; `trusted` with `seq`: 12.4 |
//! | `seal` | any | one host writes | the ledger is this installation's |
//! | `checkpoint`, unknown | any | | |
//!
//! The ledger's clock is the latest time of valid `witnessed` entries that no `clock` entry made void.
//!
//! ## 12.3 Commits
//!
//! A commit is valid if its session is open, of this host, of purpose `backup`, and named this VM and point;
//! a `base`, if any, is the VM's newest committed point and live; `taken_at` is not before the session's
//! `begin` nor after this entry; `expires_at` is not after `deadline`; its segments are new and of the
//! session.
//!
//! A **void commit** is the exception: if its session is open and of this host, who is admitted, and its
//! point id is not known, it closes and adopts its session as if valid, and its point is a root (nothing it reaches may be deleted)
//! until its time is over; but it is not listed, not restored, and not the newest of its VM. Programs of
//! two versions that disagree on a rule must not delete each other's data.
//!
//! ## 12.4 Terms
//!
//! Lengths are `N days|weeks|months|years`, of the calendar of `timezone`. *M* is `max_retention` (at its
//! shortest: 2 months are 59 days), *W* `restore_window` (at its longest), *B* `erase_budget`, or half of
//! *M* − *W*, at least 1 and at most 28 days. Needed: *M* ≥ 3, *B* + 2 ≤ *M*. A committer writes `deadline` =
//! `taken_at` + `max_retention` by the calendar and `expires_at` = `deadline` − *B* days, but not while its
//! night is within the window and not within 24 h of `taken_at`. When a policy changes, `expires_at` becomes
//! the earlier of the old and the new one, `deadline` the earlier of the old one and of the later of
//! (`taken_at` + new maximum, time of the entry + *B* days). A reader needs none of this.
//!
//! A committer whose `begin` is `alone` counts from the last witnessed time before it instead of `taken_at`.
//! `trusted` with `seq` says that the signer's clock was right from that entry on: points whose session it
//! began there or later then have the later of what they had and what counts from `taken_at`, and one that is
//! expired though that is still to come is live again (a reader may leave it expired). After `void`, points whose
//! `begin` or `commit` is not witnessed, and for whom no `trusted` that is witnessed speaks, are counted anew, from
//! what was witnessed up to their `begin` and still is; what was kept the longer goes as when a policy changes.
//!
//! ## 12.5 Marks
//!
//! One row a pack: dead bytes, earliest deadline, `erase` entries. A `reclaimed` entry is *current* if its
//! `marked_at` is not below that of any before. For each row of it: a pack without a row gets this one,
//! unless nothing is dead; a row without dead bytes removes the pack's row, if current; else the earlier
//! deadline and the union of the erases hold, and the dead bytes, if current. Rows of `deleted` packs go.
//! Then every row gets the `erase` entries up to `marked_at` that no mark had seen, with the earliest deadline
//! of their points: what is dead may be theirs. When a policy changes, a row's deadline becomes the earlier of
//! its own and those of the points of its `erase` entries. A reader needs none of this.
//!
//! A reclaim copies what was live when its session began. So its packs may hold bytes of any later `erase`
//! entry, also of one that a mark has seen before the session was adopted: the first row of such a pack
//! gets those entries, and until a mark has seen the packs (`marked_at` at or after the `condemn`), or while
//! such a session is open, no point that was erased after its `begin` counts as destroyed.
//!
//! ## 12.6 Audits
//!
//! A full reads everything, whatever is known of changes. Where the source also told the changes since
//! `against`, the VM's newest point at that time, each chunk that they do not touch must be as it was in that
//! point. `differing_bytes` counts those that are not, each by its length. A disk is named if it could be
//! compared: its changes were known, it has the size and chunk size that it had, and every node that was
//! needed opened. `audit` stands only where a disk is named. It never has a part in whether an entry is valid.
//!
//! What differs was changed after the last full before `against` (a full holds what was read, so what was
//! hidden before it is in it), unseen by the tracking of one of the nights since. So when a valid full
//! says that a disk differs, all incrementals that stand on the same full as `against` are *suspect*: their
//! chunks are those that were stored, but may not be those of the disk at that instant. An incremental
//! stands on the full that its `base` is or stands on. Fulls are never suspect, nor are the points of a
//! week that no differing audit has spoken of: a clean audit is no proof for them, and none is claimed.
//!
//! From then on the tracking of that disk is *distrusted*, and a writer takes fulls of the VM only, until a
//! valid full says that the disk does not differ, against the point that is the VM's newest at that entry;
//! or has no such disk. An incremental that is committed in between all the same is suspect. Void commits
//! have no part in this. A reader may restore a suspect point, and tells that it is one.
//!
//! # 13. Certificates
//!
//! `certificates/<id>.json` is JSON for people and programs; `<id>.json.minisig` its signature. Both count
//! only if a `reclaimed` entry names their hashes. Fields: `vmkeep_deletion_certificate` (1), `id`,
//! `repository`, `customer`, `customer_uid`, `issued_at` (after the stores were listed, and not before
//! anything that is named), `issued_by` (host id), `stores` (the places that
//! were listed; nothing is said of others), `statement`, `erased` and `destroyed` (lists of objects `point`,
//! `vm`, `taken_at`, `deadline`, `erase_entry`, `erased_at`: the time of that entry, which may be absent;
//! records destroyed since the last certificate; points of which
//! no byte is left), `packs_deleted`, `unreadable_bytes_left`, `unreadable_bytes_deadline` (or null: nothing is
//! left, or some of it is locked by the store),
//! `ledger_seq`, `ledger_hash` (the ledger's end when the stores had been listed), `objects_listed`.
//!
//! The signature is in minisign's format, made with the host's Ed25519 key. *Key number*: the first 8 bytes
//! of BLAKE3(host id). Public key for `minisign -V -P`: base64 of `Ed` ‖ key number ‖ host id (42 bytes). The
//! file is four lines, each ended by a line feed:
//!
//! ```text
//! untrusted comment: <anything>
//! <base64 of "ED" ‖ key number ‖ signature (64) of BLAKE2b-512 of the certificate>
//! trusted comment: <at most 900 printable ASCII characters>
//! <base64 of the signature (64) of: the signature above (64) ‖ the trusted comment's text>
//! ```
//!
//! The three kinds of signed messages cannot be mistaken for each other: a ledger entry begins with its
//! context, a certificate's message is a hash of 64 bytes, a comment's begins with a signature.
//!
//! # 14. Order of writing
//!
//! 1. `begin` stands (created, and read back) before any object of the session is created.
//! 2. Packs. Before a pack is sent its frames are opened again from the bytes to be sent.
//! 3. When all packs are acknowledged: the index segment (none, if no pack was written).
//! 4. With `backup`: the point record.
//! 5. `commit`, `condemn` or `merge`, in the next free slot, checked against all entries before it; again,
//!    if the slot was lost. A committer also checks that every pack it deduplicated against outside of its
//!    base's tree is born and not condemned.
//!
//! A slot is taken by creating `ledger/<seq>` *only if it is absent* (but 14.1). Where the outcome is not known, the
//! same bytes are sent until the answer is "created" or "exists", then compared; absence proves nothing.
//!
//! A pack or segment is *born* by the entry that adopts its session. Nobody relies on anything unborn. A
//! session that is given up gets an `abort` first; then its objects are deleted, the point record first.
//!
//! Deleting: `expire`, later `erase`, then the point record is destroyed. `condemn` stands before a pack is
//! deleted, and who deletes it has found each tag in it that is still reached in a pack that is not
//! condemned. Then `reclaimed`. A merge's old segments are deleted after `merge` stands. Keys, entries and
//! certificates stay.
//!
//! ## 14.1 Where one host writes
//!
//! A store that lets a second writer overwrite an object cannot order the entries of two hosts, and an
//! entry that a dead process left under way can land at any later time. A repository made for one host
//! there has the feature `one-writer`, and its geneses say `writers`. An entry's name has its hash in it,
//! so nothing is overwritten, and there may be several with one number, each with the `prev` of the same
//! entry before: then the one on which the longest chain stands counts; of those with equally long chains,
//! the one whose name (its hash) comes first. Entries that do not count stay, and mean nothing. What is
//! no sound entry, or of a later version, is passed over beside one that is sound and follows. A reader
//! whose end loses to another one while it reads begins again at entry 1.
//!
//! The processes of the host take turns (a lock on the host). Unless it goes on from the entry that it
//! wrote last itself, no other process having begun a turn since, whoever has the turn writes a `seal` and
//! its own entry on it, and only then trusts, acts or acknowledges. Why that is enough: whoever sends an
//! entry has read what had landed, or read back what it sent, so whatever is under way is at most one
//! longer than the longest chain that has landed; the entry on the seal is two longer. A genesis is not
//! sealed; the first entry on a seal after it settles it. Nothing is deleted, and no end is remembered,
//! that is not settled so.
//!
//! An installation that finds another one's id in the last `seal` writes nothing, unless an operator has
//! said that it takes the other's place. Numbers of key files are random here, and `vmkeep.json` is kept on
//! the host before it is sent, so that what is sent again is the same.
//!
//! # 15. Reading
//!
//! 1. Read `ledger/0000000000000001` and on, until a name is missing; check and apply each entry. (Where one
//!    host writes: 14.1.)
//! 2. *Live* points are those of commits that were not void, neither expired nor erased. Others are not
//!    restored.
//! 3. Load the current segments; the bytes must hash to the name. Together they are the index.
//! 4. A place in a pack that is condemned, or known to be damaged, is tried after all others; one that is
//!    deleted last. The packs that exist are those in the pack sections of current segments, without the
//!    deleted ones.
//! 5. Who misses an object reads the ledger to its end and tries again, before calling it damage: a
//!    reclaim may have moved the frame. Entries are never rewritten, so reading on from the last one is
//!    enough.
//!
//! Without any usable segment, list `packs/`, take the sessions that are born, and read the directories.
//!
//! Without a usable ledger, as the last means: of `key/` whatever opens, of `points/` whatever opens with that key (a
//! record tells VM, kind, time, disks and roots), of `index/` whatever hashes to its name, and the directories of the
//! packs of which that does not list every frame. What opens by section 16 is right; but no signature says who made
//! it, and nothing says whether the point was expired, void or suspect.
//!
//! # 16. Restoring a disk from nothing
//!
//! Given a store and an age identity (a host's, or an escrow recipient's), the names of customer, VM and
//! disk, and a time:
//!
//! 1. Read `vmkeep.json`: format 1, no features but `one-writer`.
//! 2. Read the ledger from entry 1: signature, spelling, chain, rules. Entry 1 gives customer uid,
//!    repository id and customer name, which must be the ones of `vmkeep.json` and of the folder.
//! 3. Of the `key` entries, the latest whose `key/<object>.age` the identity opens; its BLAKE3 must be
//!    `hash`. The plaintext is section 4.1; its customer uid must be that of the ledger. Derive the keys.
//! 4. Of the live points of the VM, the one with the latest `taken_at` that is not after the wished time.
//! 5. Read `points/<point>`: BLAKE3 is `record_hash`; open it (section 9). VM, kind, time, names and sizes
//!    are those of the commit. Find the disk by its name: size, chunk size, root.
//! 6. Load the index from the current segments.
//! 7. To open an id of a kind: tag; places; of each place read the frame (the length is in the record),
//!    check kind, tag, lengths and checksum; open; decompress; compute the id again. The first place that
//!    passes is right: every other result is an error, and no place left is damage.
//! 8. From the root downwards: the height follows from size and chunk size; a node's number of children
//!    follows from its place; a hole stands for zeros over all that it covers. Each chunk has exactly the
//!    length of its place.
//! 9. The disk is right if every piece was opened: the root names all of it. There is nothing to compare
//!    with beyond that, and any failed piece is a failed disk, not zeros.
//!
//! # 17. Limits
//!
//! | what | at most |
//! |---|---|
//! | disk | 64 TiB |
//! | chunk, node | 1 MiB, 8 KiB |
//! | height of a tree | 6 |
//! | pack | 256 MiB (writers: 16 MiB by default, never above 240 MiB and one frame) |
//! | index segment, sections in it | 4 GiB, 32 |
//! | point record | 16 MiB |
//! | ledger entry | 1 MiB written, 1 MiB + 16 KiB read |
//! | key file, stanzas in it | 64 KiB of header and 64 KiB of content, 64 |
//! | `vmkeep.json` | 64 KiB |
//! | certificate | 64 MiB |
//! | object name | 512 bytes, 128 a part |
//!
//! # 18. What is protected
//!
//! The store is not trusted: who can read it, and who can change, swap, withhold and replay objects.
//!
//! Claimed:
//!
//! - Content, names of files and definitions are secret from who has neither the customer key nor an
//!   identity it is sealed for. Names of customers, VMs and disks, sizes, counts and times stand in the
//!   ledger in clear.
//! - Wrong content is never taken for right: each piece is bound to its id, each id to its parent, the root
//!   to the record, the record to its point id and customer, its hash to a signed entry.
//! - A ledger cannot be changed or forked unnoticed by a host that remembers its end. Entries of hosts
//!   without the role have no effect, but for two: a void commit (12.3) of an admitted host keeps
//!   bytes alive and may name segments that are not there; an unknown entry of any admitted
//!   host forbids writing. Neither makes wrong content pass for right.
//! - Customers share nothing: no key, tag, id or object of one is of use with another.
//! - Once its point record is destroyed, what only that point reached cannot be read by anybody, key
//!   holders included: the ids, which are the keys, stood nowhere else.
//!
//! Not claimed:
//!
//! - A holder of the customer key can test, offline, whether *guessable* content is among dead frames until
//!   they are deleted; therefore bytes have a deadline too. The same holder reads all living points, and
//!   could have kept ids.
//! - Destroying the record rests on the medium: a copy-on-write file system, a flash translation layer, a
//!   snapshot or an old object version may keep the old blocks.
//! - Someone with nothing but the store and an identity cannot tell a ledger cut off at its end, or an older
//!   copy of the whole store, from the present one; nor whether the first host of a customer is the right
//!   one. Compare the genesis host id, and the number and hash of the last entry, with a copy kept elsewhere.
//! - Who can delete in the store can destroy it. That is found, not prevented.
//! - Who reads without the ledger has no signature: key file, record and all below may be of anybody who can write
//!   to the store.
//! - A frame's checksum and a pack's name show damage, not authorship: a pack planted by who can write to
//!   the store fails only when it is opened with the key.
//! - The signing key of a host lies in the same file as its reading key.
//!
//! # 19. Worked example
//!
//! A customer with a fixed key (generation 1), a disk `vda` of VM `web01`: 65552 bytes in chunks of 65536.
//! Chunk 0 is zero, so a hole; chunk 1, the last, is the 16 bytes `vmkeep example 1`, too short to be
//! compressed. One node of height 1 is the root. The chunk's frame stands alone in a data pack. The record
//! is of a full taken at 2026-11-01T22:00:00Z, without mark and definition. Nonces are fixed here; a writer
//! draws them. `tests/format_example.rs` reads this text and computes it again.
//!
//! ```text
//! customer uid            = 000102030405060708090a0b0c0d0e0f
//! customer secret         = 202122232425262728292a2b2c2d2e2f303132333435363738393a3b3c3d3e3f
//! chunk id key            = 7fff802d124b2b4fdee51c67c5791a3dfd78e7f29fa87f567bc0fe33074fab69
//! node id key, height 1   = d9c2187b5b122988c9718de25d1e2a3e515425fd2a36f6f3a46689440976ff18
//! tag key                 = efde57561d3036407fa63d5a2d18374f93de0b78d204f10090e533512785a0a5
//! frame key               = 8441c3980f8b8c7b6c3054f09b6b168af6c4d658dae355f83dd8fbc34bb22fb9
//! record key              = a8f807804ee04d5f48cf0e3c5cbbab41d7cb1201da9630a7e91f551b9d97f991
//! chunk 1                 = 766d6b656570206578616d706c652031
//! chunk 1 id              = 3bf3d8ea688a4c938c7398ced34bf06daf393afc9378b41e4e79f5990229e616
//! chunk 1 tag             = 3a577995528e5d753613ed6760da3754
//! chunk 1 frame key       = ed8059d203635cfb51f88ff1ae2294c4b7fef809f61c5dcdc8fa2876005332c4
//! node                    = 0000000000000000000000000000000000000000000000000000000000000000
//!                           3bf3d8ea688a4c938c7398ced34bf06daf393afc9378b41e4e79f5990229e616
//! node id (the root)      = aae25d393f091539d45077e6642fae9592338f77cd8c6e08eba8993c8e8d90fd
//! node tag                = 8cc882d6162f445d5b96e5d40e501869
//! frame associated data   = 0000000010000000000102030405060708090a0b0c0d0e0f3a577995528e5d75
//!                           3613ed6760da3754
//! frame nonce             = a0a1a2a3a4a5a6a7a8a9aaab
//! frame                   = 000000003a577995528e5d753613ed6760da3754100000002c00000000ecfc1c
//!                           8166f347720ad6b7d26dbabaa0a1a2a3a4a5a6a7a8a9aaab98c9183408077ddd
//!                           0a2ccebedc6c1b1fdfbadaec7359ea45b89641edb67cc124
//! pack header             = 564d4b5041434b310100000000000000505152535455565758595a5b5c5d5e5f
//!                           606162636465666768696a6b6c6d6e6f
//! pack directory          = 3a577995528e5d753613ed6760da375430000000580000000000000000000000
//! pack directory hash     = e7f653057ba444799dceead185a673595748b371d7cf407c849d4b56b742a9c5
//! pack trailer            = 8800000001000000564d4b50454e4431
//! pack hash               = b611b28ce6820dbd2343128d0f3f362b74a9bda244c49cdf57977f30a7f328c9
//! point id                = 404142434445464748494a4b4c4d4e4f
//! record plaintext        = 0500000077656230310060b6e76a000000000100030000007664611000010000
//!                           00000000000100aae25d393f091539d45077e6642fae9592338f77cd8c6e08eb
//!                           a8993c8e8d90fd0000000000
//! record cipher key       = df0357632d5f900c53a00fb310159f5e5f168dee740e9a13f4468a5e7c9966b9
//! record associated data  = 564d4b504f494e3101000000000102030405060708090a0b0c0d0e0f40414243
//!                           4445464748494a4b4c4d4e4f
//! record nonce            = b0b1b2b3b4b5b6b7b8b9babb
//! record                  = 564d4b504f494e3101000000b0b1b2b3b4b5b6b7b8b9babb9a7e8500089de87e
//!                           62bfd0eddfe673b9abc4bf6e77be6ceeb0dff00192361c202d61c6d72e168862
//!                           1b6f2c17ab8f055794412ace7fe121969d9468cdfb3161fa77d38ab63da3056c
//!                           b8403e29a9c543bfeba85b57a18afea332dd9835
//! record hash             = cab33c5eb90641b9e9fe6df0da1c0361301002c0c682f649940b5ba821462df4
//! ```

pub mod certificate;
pub mod entry;
#[cfg(any(test, fuzzing))]
pub mod hostile_bytes;
pub mod names;
pub mod pack;
pub mod repository_file;
pub mod segment;
pub mod text;
pub mod wire;

pub use wire::FormatError;

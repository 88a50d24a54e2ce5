#!/usr/bin/env python3
"""Lists what a bucket holds below a prefix with another client than vmkeep's, and compares.

    independent_listing.py ENDPOINT BUCKET PREFIX < EXPECTED

EXPECTED is JSON: `keys`, all objects relative to the prefix; `gone`, what no key may contain; and
`has_versions`, whether the server can list versions. Right is a bucket that has, below the prefix,
these objects in one version each, and nothing else: no other version, no delete marker, no unfinished
upload. Needs the packages in `independent_listing.txt`, and the keys in the variables that boto3 reads.
Prints what it saw; fails with a line for each thing that should not be.
"""

import json
import sys
from collections import Counter

import boto3
from botocore.config import Config


def listed(client, operation, field, bucket, prefix):
    pages = client.get_paginator(operation).paginate(Bucket=bucket, Prefix=prefix)
    return [entry for page in pages for entry in page.get(field, [])]


def main(arguments):
    endpoint, bucket, prefix = arguments
    prefix = f"{prefix}/"
    expected = json.load(sys.stdin)
    client = boto3.client(
        "s3",
        endpoint_url=endpoint,
        region_name="us-east-1",
        config=Config(s3={"addressing_style": "path"}),
    )

    def keys(operation, field):
        return Counter(entry["Key"] for entry in listed(client, operation, field, bucket, prefix))

    objects = keys("list_objects_v2", "Contents")
    uploads = keys("list_multipart_uploads", "Uploads")
    if expected["has_versions"]:
        versions = keys("list_object_versions", "Versions")
        markers = keys("list_object_versions", "DeleteMarkers")
    else:
        versions, markers = objects, Counter()

    wanted = Counter(prefix + key for key in expected["keys"])
    wrong = [f"missing: {key}" for key in sorted((wanted - objects).elements())]
    for what, found in [
        ("object", objects - wanted),
        ("hidden or older version", versions - objects),
        ("object without a version", objects - versions),
        ("delete marker", markers),
        ("unfinished upload", uploads),
    ]:
        wrong += [f"{what}: {key}" for key in sorted(found.elements())]
    for part in expected["gone"]:
        everywhere = objects + versions + markers + uploads
        wrong += [f"not gone: {key}" for key in sorted(everywhere) if part in key]

    counts = [("objects", objects), ("versions", versions), ("markers", markers), ("uploads", uploads)]
    print(json.dumps({name: found.total() for name, found in counts}))
    for line in wrong:
        print(line, file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

/*
 * The work of the test guest, whose traces show on an image which instant it was taken at.
 *
 *   writer write SLOTS PAUSE_US FILE...   numbered records, each to all files in turn, for ever
 *   writer latency COUNT FILE             how long 4 KiB overwrites take until they are safe
 *
 * Record n is safe in one file before it is written to the next one. So at every instant a file
 * has the same last record as the one before it, or is exactly one behind.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#define RECORD 4096
#define MAGIC "SEQREC02"
#define MAX_FILES 8
#define REPORT_NS 200000000ull
#define LATENCY_SLOTS 256

/* Little-endian, as the guest is; tests/support/live/check.rs reads the same layout. */
struct record {
    char magic[8];
    uint64_t number;
    uint64_t checksum; /* FNV-1a of the record with zero in this place */
    uint64_t slots;    /* record n lies in slot n % slots */
    unsigned char filling[RECORD - 32];
};

static volatile sig_atomic_t stopping;

static void stop(int signal_number) {
    (void)signal_number;
    stopping = 1;
}

static void fail(const char *what) {
    printf("WRITER FAILED %s: %s\n", what, strerror(errno));
    fflush(stdout);
    exit(1);
}

static uint64_t now_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000ull + (uint64_t)now.tv_nsec;
}

static uint64_t checksum_of(const struct record *record) {
    struct record copy = *record;
    const unsigned char *bytes = (const unsigned char *)&copy;
    uint64_t hash = 0xcbf29ce484222325ull;
    copy.checksum = 0;
    for (size_t place = 0; place < RECORD; place++)
        hash = (hash ^ bytes[place]) * 0x100000001b3ull;
    return hash;
}

/* The same number always gives the same bytes: writing a record again changes nothing. */
static void make(struct record *record, uint64_t number, uint64_t slots) {
    uint64_t state = number * 0x9e3779b97f4a7c15ull + 1;
    memcpy(record->magic, MAGIC, sizeof record->magic);
    record->number = number;
    record->slots = slots;
    for (size_t place = 0; place < sizeof record->filling; place += sizeof state) {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        memcpy(record->filling + place, &state, sizeof state);
    }
    record->checksum = checksum_of(record);
}

static uint64_t last_good(int file, uint64_t slots) {
    struct record record;
    uint64_t last = 0;
    for (uint64_t slot = 0; slot < slots; slot++) {
        if (pread(file, &record, RECORD, (off_t)(slot * RECORD)) != RECORD)
            continue;
        if (memcmp(record.magic, MAGIC, sizeof record.magic) == 0 && record.number > last &&
            checksum_of(&record) == record.checksum)
            last = record.number;
    }
    return last;
}

static void write_safely(int file, const void *bytes, uint64_t slot) {
    if (pwrite(file, bytes, RECORD, (off_t)(slot * RECORD)) != RECORD)
        fail("pwrite");
    if (fdatasync(file) != 0)
        fail("fdatasync");
}

static int open_file(const char *path) {
    int file = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0644);
    if (file < 0)
        fail(path);
    return file;
}

static int write_for_ever(uint64_t slots, useconds_t pause_us, int count, char **paths) {
    int files[MAX_FILES];
    uint64_t least = UINT64_MAX, most = 0;
    if (count < 1 || count > MAX_FILES || slots == 0)
        return 2;
    for (int index = 0; index < count; index++) {
        files[index] = open_file(paths[index]);
        uint64_t last = last_good(files[index], slots);
        least = last < least ? last : least;
        most = last > most ? last : most;
    }
    /*
     * Cut off between two files, the record of the first one is missing in the others and has to
     * be written again. Disks that do not belong together (a new one) only go on together.
     */
    uint64_t number = most - least <= 1 ? least + 1 : most + 1;
    printf("WRITER from %llu\n", (unsigned long long)number);
    fflush(stdout);

    uint64_t reported = now_ns();
    for (; !stopping; number++) {
        struct record record;
        make(&record, number, slots);
        for (int index = 0; index < count; index++)
            write_safely(files[index], &record, number % slots);
        uint64_t now = now_ns();
        if (now - reported >= REPORT_NS) {
            printf("SEQ %llu\n", (unsigned long long)number);
            fflush(stdout);
            reported = now;
        }
        if (pause_us > 0)
            usleep(pause_us);
    }
    printf("SEQ %llu\n", (unsigned long long)(number - 1));
    fflush(stdout);
    return 0;
}

static int ascending(const void *left, const void *right) {
    uint64_t a = *(const uint64_t *)left, b = *(const uint64_t *)right;
    return (a > b) - (a < b);
}

static int latency(size_t count, const char *path) {
    static struct record record;
    int file = open_file(path);
    uint64_t *taken = calloc(count, sizeof *taken);
    if (count == 0 || taken == NULL)
        return 2;
    /* Only overwrites are measured: what has to be allocated is allocated before. */
    if (lseek(file, 0, SEEK_END) < (off_t)LATENCY_SLOTS * RECORD) {
        for (uint64_t slot = 0; slot < LATENCY_SLOTS; slot++)
            if (pwrite(file, &record, RECORD, (off_t)(slot * RECORD)) != RECORD)
                fail("pwrite");
        if (fsync(file) != 0)
            fail("fsync");
    }
    uint64_t place = now_ns();
    for (size_t index = 0; index < count; index++) {
        place = place * 6364136223846793005ull + 1442695040888963407ull;
        make(&record, place, 1);
        uint64_t start = now_ns();
        write_safely(file, &record, (place >> 33) % LATENCY_SLOTS);
        taken[index] = (now_ns() - start) / 1000;
    }
    qsort(taken, count, sizeof *taken, ascending);
    printf("LATENCY count=%zu p50=%llu p99=%llu max=%llu\n", count,
           (unsigned long long)taken[count / 2], (unsigned long long)taken[count * 99 / 100],
           (unsigned long long)taken[count - 1]);
    return 0;
}

int main(int count, char **words) {
    /* A round that has begun is finished, so that all files end with the same record. */
    struct sigaction action = {.sa_handler = stop, .sa_flags = SA_RESTART};
    sigaction(SIGTERM, &action, NULL);
    if (count >= 5 && strcmp(words[1], "write") == 0)
        return write_for_ever(strtoull(words[2], NULL, 10),
                              (useconds_t)strtoul(words[3], NULL, 10), count - 4, words + 4);
    if (count == 4 && strcmp(words[1], "latency") == 0)
        return latency(strtoul(words[2], NULL, 10), words[3]);
    return 2;
}

// `ring` in C, on the guest ABI alone, with nothing but a C library: what it knows of the parent is
// in docs/abi.md.
//
// Copies the nonce of every TestResource from one namespace to the next; a copy only ever raises
// it. The parent lists, watches and reconnects. This guest hears of each object, reads its
// counterpart, and writes that when its nonce is smaller. All it remembers is what is under way.
//
//   IN_NAMESPACE    where from (`default`)
//   OUT_NAMESPACE   where to (`default`)
//
// Out of memory is the end of the instance: the parent starts another, which lists anew.

#define _GNU_SOURCE // asprintf
#include <inttypes.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

// The ABI.

#define IMPORT(module, name) __attribute__((import_module(module), import_name(name)))
#define EXPORT(name) __attribute__((export_name(name)))

typedef int64_t verb(const char *descriptor, size_t length);

IMPORT("kube_v1", "watch") verb kube_watch;
IMPORT("kube_v1", "get") verb kube_get;
IMPORT("kube_v1", "create") verb kube_create;
IMPORT("kube_v1", "patch") verb kube_patch;
IMPORT("host_v1", "timer") int32_t host_timer(uint64_t nanoseconds);
IMPORT("host_v1", "cancel") int32_t host_cancel(int64_t operation);
IMPORT("host_v1", "log") int32_t host_log(int32_t level, const char *text, size_t length);

enum { START = 1, STOP, TIMER, RESULT, ITEM, HEAD, DATA, END, ERROR };
enum { LOG_ERROR = 1, LOG_WARN, LOG_INFO };
enum { TOO_MANY_OPEN = -3 };

#define SECOND UINT64_C(1000000000)
// After a failure, and after one that does not mend by itself.
#define PAUSE (1 * SECOND)
#define LONG_PAUSE (30 * SECOND)
// A first listing may be long. What is open stays far below the parent's limit.
#define MOST_OPEN 64

enum stage { WAITING, READING, CREATING, PATCHING };

// The counterpart of an object whose nonce may have to be raised.
struct work {
    struct work *next;
    char *name;
    int64_t nonce;     // that it shall have
    int64_t written;   // that the create or patch under way gives it
    int64_t operation; // the one under way, unless it waits
    uint64_t due;      // when it has waited long enough
    enum stage stage;
    bool listed; // seen since the listing began
};

static struct work *works; // What is done is removed.
static unsigned open_operations;
static int64_t watch;
static const char *source, *target;
static char *target_json;

static void *checked(void *memory)
{
    if (memory == NULL)
        abort();
    return memory;
}

__attribute__((format(printf, 1, 2))) static char *format(const char *how, ...)
{
    char *text;
    va_list values;
    va_start(values, how);
    if (vasprintf(&text, how, values) < 0)
        abort();
    va_end(values);
    return text;
}

// Logs a line, and frees it.
static void say(int32_t level, char *line)
{
    host_log(level, line, strlen(line));
    free(line);
}

// JSON. A value is the part of a payload that it is written in. It is looked through where it is:
// of an object of a megabyte, three members are wanted. Whether brackets match in kind is not
// checked, since what the parent sends is JSON; but nothing is ever read beyond its end.

struct json {
    const char *at, *end; // Equal: there is none.
};

static const struct json NONE;

static const char *skip_space(const char *at, const char *end)
{
    while (at < end && (*at == ' ' || *at == '\t' || *at == '\n' || *at == '\r'))
        at++;
    return at;
}

// Whether `character` is next; if so, goes beyond it.
static bool take(const char **at, const char *end, char character)
{
    *at = skip_space(*at, end);
    if (*at == end || **at != character)
        return false;
    ++*at;
    return true;
}

// The end of the string whose opening quote is at `at`; NULL when it breaks off.
static const char *string_end(const char *at, const char *end)
{
    for (at++; at < end; at++) {
        if (*at == '"')
            return at + 1;
        if (*at == '\\' && ++at == end)
            break;
    }
    return NULL;
}

// The next value, and goes beyond it.
static struct json take_value(const char **from, const char *end)
{
    const char *begin = skip_space(*from, end), *at = begin;
    // A count instead of recursion: nesting costs no stack.
    size_t depth = 0;
    while (at < end) {
        if (*at == '"') {
            at = string_end(at, end);
            if (at == NULL)
                return NONE;
            if (depth == 0)
                break;
            continue;
        }
        if (depth == 0 && at > begin && strchr(" \t\n\r,:]}", *at) != NULL)
            break; // The end of a number or word.
        bool opens = *at == '{' || *at == '[', closes = *at == '}' || *at == ']';
        if (closes && depth == 0)
            return NONE;
        at++;
        depth = depth + opens - closes;
        if (closes && depth == 0)
            break;
    }
    if (depth > 0)
        return NONE;
    *from = at;
    return (struct json){begin, at};
}

// Four hexadecimal digits; negative when they are not that.
static int32_t hexadecimal(const char *at, const char *end)
{
    static const char digits[] = "0123456789abcdef0123456789ABCDEF";
    int32_t value = 0;
    if (end - at < 4)
        return -1;
    for (int i = 0; i < 4; i++) {
        const char *digit = memchr(digits, at[i], sizeof digits - 1);
        if (digit == NULL)
            return -1;
        value = value * 16 + (int32_t)((digit - digits) % 16);
    }
    return value;
}

static char *put_utf8(char *out, int32_t c)
{
    static const unsigned char first[] = {0, 0xc0, 0xe0, 0xf0};
    int more = (c >= 0x80) + (c >= 0x800) + (c >= 0x10000);
    *out++ = (char)(first[more] | c >> 6 * more);
    while (more-- > 0)
        *out++ = (char)(0x80 | (c >> 6 * more & 0x3f));
    return out;
}

// The text of a string, to be freed; NULL when the value is none. What no C string or no UTF-8 can
// hold (a zero, half a surrogate pair) becomes U+FFFD.
static char *decode(struct json value)
{
    static const char escapes[] = "\"\\/bfnrt", characters[] = "\"\\/\b\f\n\r\t";
    if (value.at == value.end || *value.at != '"')
        return NULL;
    const char *at = value.at + 1, *end = value.end - 1;
    // An escape is never shorter than what it stands for.
    char *text = checked(malloc((size_t)(end - at) + 1)), *out = text;
    while (at < end) {
        if (*at != '\\') {
            *out++ = *at++;
            continue;
        }
        // A string does not end in the middle of an escape: there are two characters.
        const char *escape = memchr(escapes, at[1], sizeof escapes - 1);
        int32_t c = at[1] == 'u' ? hexadecimal(at + 2, end) : -1, low = -1;
        if (escape != NULL) {
            *out++ = characters[escape - escapes];
            at += 2;
            continue;
        }
        if (c < 0) {
            free(text);
            return NULL;
        }
        at += 6;
        if (c >> 10 == 0xd800 >> 10 && end - at >= 6 && at[0] == '\\' && at[1] == 'u')
            low = hexadecimal(at + 2, end);
        if (low >> 10 == 0xdc00 >> 10) {
            c = 0x10000 + ((c - 0xd800) << 10) + (low - 0xdc00);
            at += 6;
        }
        out = put_utf8(out, c == 0 || c >> 11 == 0xd800 >> 11 ? 0xfffd : c);
    }
    *out = '\0';
    return text;
}

// The way back, quotes and all.
static char *encode(const char *text)
{
    char *json = checked(malloc(6 * strlen(text) + 3)), *out = json;
    *out++ = '"';
    for (; *text != '\0'; text++) {
        if (*text == '"' || *text == '\\')
            *out++ = '\\';
        if ((unsigned char)*text < ' ')
            out += sprintf(out, "\\u%04x", (unsigned)*text);
        else
            *out++ = *text;
    }
    *out++ = '"';
    *out = '\0';
    return json;
}

static bool is(struct json value, const char *text)
{
    char *decoded = decode(value);
    bool same = decoded != NULL && strcmp(decoded, text) == 0;
    free(decoded);
    return same;
}

static struct json member(struct json object, const char *name)
{
    const char *at = object.at, *end = object.end;
    if (!take(&at, end, '{'))
        return NONE;
    do {
        struct json key = take_value(&at, end);
        if (!take(&at, end, ':'))
            break;
        struct json value = take_value(&at, end);
        if (is(key, name))
            return value;
    } while (take(&at, end, ','));
    return NONE;
}

// Whether it is an integer of 64 bits.
static bool integer(struct json value, int64_t *number)
{
    bool negative = value.at < value.end && *value.at == '-';
    const char *at = value.at + negative;
    *number = 0;
    if (at == value.end)
        return false;
    for (; at < value.end; at++) {
        if (*at < '0' || *at > '9' || __builtin_mul_overflow(*number, 10, number) ||
            __builtin_add_overflow(*number, negative ? '0' - *at : *at - '0', number))
            return false;
    }
    return true;
}

// The work.

// Where the work on an object is linked, or would be. What is under way is little, but for a first
// listing of many thousands of objects.
static struct work **find(const char *name)
{
    struct work **link = &works;
    while (*link != NULL && strcmp((*link)->name, name) != 0)
        link = &(*link)->next;
    return link;
}

static void drop(struct work **link)
{
    struct work *work = *link;
    if (work->stage != WAITING) {
        host_cancel(work->operation);
        open_operations--;
    }
    *link = work->next;
    free(work->name);
    free(work);
}

static uint64_t monotonic(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * SECOND + (uint64_t)now.tv_nsec;
}

static void fail(struct work *work, uint64_t pause, const char *why)
{
    int seconds = (int)(pause / SECOND);
    // An API server's words may be longer than the log takes.
    say(LOG_WARN, format("%s -> %s: %.4000s; trying again in %d s", work->name, target, why,
                         seconds));
    work->stage = WAITING;
    work->due = monotonic() + pause;
}

static void start(struct work *work, enum stage stage, verb *verb, char *descriptor)
{
    work->operation = verb(descriptor, strlen(descriptor));
    free(descriptor);
    if (work->operation > 0) {
        work->stage = stage;
        open_operations++;
    } else {
        char why[32];
        snprintf(why, sizeof why, "refused with code %d", (int)work->operation);
        // The parent has logged what is wrong with it.
        fail(work, work->operation == TOO_MANY_OPEN ? PAUSE : LONG_PAUSE, why);
    }
}

#define TESTRESOURCES "\"group\":\"amurant.io\",\"version\":\"v1\",\"plural\":\"testresources\""

static void fetch(struct work *work)
{
    char *name = encode(work->name);
    start(work, READING, kube_get,
          format("{" TESTRESOURCES ",\"namespace\":%s,\"name\":%s}", target_json, name));
    free(name);
}

// Creates the counterpart, or changes the version of it that was read: the API server refuses the
// change of any later one.
static void store(struct work *work, struct json version)
{
    char now[32] = "";
    time_t seconds = time(NULL);
    strftime(now, sizeof now, "%FT%TZ", gmtime(&seconds));
    char *name = encode(work->name);
    char *spec = format("{\"nonce\":%" PRId64 ",\"updated_at\":\"%s\"}", work->nonce, now);
    work->written = work->nonce;
    if (version.at == version.end)
        start(work, CREATING, kube_create,
              format("{" TESTRESOURCES ",\"namespace\":%s,\"body\":"
                     "{\"apiVersion\":\"amurant.io/v1\",\"kind\":\"TestResource\","
                     "\"metadata\":{\"name\":%s},\"spec\":%s}}",
                     target_json, name, spec));
    else
        start(work, PATCHING, kube_patch,
              format("{" TESTRESOURCES ",\"namespace\":%s,\"name\":%s,\"patchType\":\"merge\","
                     "\"body\":{\"metadata\":{\"resourceVersion\":%.*s},\"spec\":%s}}",
                     target_json, name, (int)(version.end - version.at), version.at, spec));
    free(spec);
    free(name);
}

// An object was seen.
static void seen(struct json object, bool deleted)
{
    char *name = decode(member(member(object, "metadata"), "name"));
    int64_t nonce;
    if (name == NULL)
        return;
    struct work **link = find(name), *work = *link;
    if (deleted) {
        if (work != NULL)
            drop(link);
    } else if (!integer(member(member(object, "spec"), "nonce"), &nonce)) {
        say(LOG_WARN, format("%s/%s has no nonce that is a number of 64 bits", source, name));
    } else {
        if (work == NULL) {
            work = *link = checked(calloc(1, sizeof *work));
            work->name = name;
            name = NULL;
        }
        // An answer that is under way leads on to this nonce; what waits after a failure need not.
        work->nonce = nonce;
        work->due = 0;
        work->listed = true;
    }
    free(name);
}

// A step of the watch.
static void step(struct json item)
{
    struct json type = member(item, "type");
    if (is(type, "Init")) {
        for (struct work *work = works; work != NULL; work = work->next)
            work->listed = false;
    } else if (is(type, "InitDone")) {
        // What has been deleted while nobody looked.
        for (struct work **link = &works; *link != NULL;) {
            if ((*link)->listed)
                link = &(*link)->next;
            else
                drop(link);
        }
    } else {
        seen(member(item, "object"), is(type, "Delete"));
    }
}

static void succeeded(struct work **link, enum stage stage, struct json object)
{
    struct work *work = *link;
    struct json version = member(member(object, "metadata"), "resourceVersion");
    int64_t nonce;
    if (stage != READING) {
        say(LOG_INFO, format("%s/%s: nonce %" PRId64 " -> %s", source, work->name, work->written,
                             target));
        // There may be a higher one by now.
        work->due = 0;
        if (work->written >= work->nonce)
            drop(link);
    } else if (version.at == version.end ||
               !integer(member(member(object, "spec"), "nonce"), &nonce)) {
        fail(work, LONG_PAUSE, "what is there has no nonce that is a number of 64 bits");
    } else if (nonce >= work->nonce) {
        drop(link);
    } else {
        store(work, version);
    }
}

static void failed(struct work *work, enum stage stage, struct json status)
{
    int64_t code = 0;
    integer(member(status, "code"), &code);
    if (stage == READING && code == 404) {
        store(work, NONE);
        return;
    }
    char *message = decode(member(status, "message"));
    // A namespace that is not there: nothing else is looked up by a `create`.
    fail(work, stage == CREATING && code == 404 ? LONG_PAUSE : PAUSE,
         message != NULL ? message : "no message");
    free(message);
}

static void answered(int64_t operation, bool success, struct json answer)
{
    if (operation == watch) {
        // It can never work.
        char *message = decode(member(answer, "message"));
        say(LOG_ERROR, format("watch: %.4000s", message != NULL ? message : "no message"));
        exit(1);
    }
    for (struct work **link = &works; *link != NULL; link = &(*link)->next) {
        struct work *work = *link;
        enum stage stage = work->stage;
        if (stage == WAITING || work->operation != operation)
            continue;
        work->stage = WAITING;
        open_operations--;
        if (success)
            succeeded(link, stage, answer);
        else
            failed(work, stage, answer);
        return;
    }
}

// Starts what is due, and asks to be called when the next is.
static void go_on(void)
{
    uint64_t now = monotonic(), next = UINT64_MAX;
    for (struct work *work = works; work != NULL; work = work->next) {
        if (work->stage == WAITING && work->due <= now && open_operations < MOST_OPEN)
            fetch(work);
        // What is due and finds no room goes on at the next answer.
        if (work->stage == WAITING && work->due > now && work->due < next)
            next = work->due;
    }
    // Every event drops the deadline.
    if (next != UINT64_MAX)
        host_timer(next - now);
}

static const char *variable(const char *name)
{
    const char *value = getenv(name);
    return value != NULL ? value : "default";
}

static void begin(void)
{
    source = variable("IN_NAMESPACE");
    target = variable("OUT_NAMESPACE");
    target_json = encode(target);
    char *namespace = encode(source);
    char *descriptor = format("{" TESTRESOURCES ",\"namespace\":%s}", namespace);
    watch = kube_watch(descriptor, strlen(descriptor));
    free(descriptor);
    free(namespace);
    if (watch < 0) {
        say(LOG_ERROR, format("watch: refused with code %d", (int)watch));
        exit(1);
    }
}

EXPORT("alloc") void *allocate(size_t length)
{
    return malloc(length);
}

EXPORT("on_event") void on_event(int64_t operation, int32_t kind, char *payload, size_t length)
{
    struct json json = length > 0 ? (struct json){payload, payload + length} : NONE;
    switch (kind) {
    case START:
        begin();
        break;
    case STOP:
        exit(0);
    case ITEM:
        step(json);
        break;
    case RESULT:
    case ERROR:
        answered(operation, kind == RESULT, json);
        break;
    }
    free(payload);
    go_on();
}

/* The CNI plugin that a container runtime executes (CNI spec 1.1.0, section 2).
 *
 * It decides nothing: it hands environment, stdin and the pod's network namespace to the
 * daemon over a Unix socket and prints the answer. Every operation of the daemon can be
 * repeated without harm, so a request that a restart of the daemon cut off is sent again.
 *
 *   request  "MNX1", u32 size of environment, u32 size of stdin (big endian), then both;
 *            environment: KEY=VALUE\0 ..., and MANX_PLUGIN, the name it was run by (manx-ipam:
 *            addresses alone); the namespace's descriptor rides on the first byte
 *   answer   "MNX1", u32 exit code, u32 size, then what goes to stdout
 *
 * VERSION is answered here. fallback.py does the same in Python where there is no compiler.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <sys/un.h>
#include <unistd.h>

#ifndef MANX_CNI_SOCKET
#define MANX_CNI_SOCKET "/run/manx/cni.sock"
#endif
#ifndef MANX_CNI_RETRIES
#define MANX_CNI_RETRIES 200 /* 10 s: a daemon that restarts is back by then */
#endif

enum {
    HEADER = 12,
    LIMIT = 1 << 20,     /* bytes of environment, stdin and answer: far above any real one */
    STDIN_MS = 5000,     /* a runtime writes its configuration at once, then closes */
    ANSWER_SECONDS = 90, /* an ADD may wait for other parts of the node */
    RETRY_MS = 50,
    RETRIES = MANX_CNI_RETRIES,
};
enum { ERR_ENVIRONMENT = 4, ERR_IO = 5, ERR_TRY_AGAIN = 11, ERR_NOT_AVAILABLE = 50 };

static const char *const VERSIONS[] = {"0.1.0", "0.2.0", "0.3.0", "0.3.1",
                                       "0.4.0", "1.0.0", "1.1.0"};
static const size_t N_VERSIONS = sizeof VERSIONS / sizeof *VERSIONS;
static const char *version = "1.1.0"; /* of what is printed: that of stdin where it has one */

struct buffer {
    char *data;
    size_t size, room;
};

/* Room for `more` bytes behind the content. LIMIT keeps the sums far below SIZE_MAX. */
static char *reserve(struct buffer *b, size_t more) {
    if (b->room - b->size < more) {
        b->room = b->size + more + 4096;
        if (!(b->data = realloc(b->data, b->room)))
            abort();
    }
    return b->data + b->size;
}

static void append(struct buffer *b, const void *data, size_t size) {
    memcpy(reserve(b, size), data, size);
    b->size += size;
}

static void append_text(struct buffer *b, const char *text) { append(b, text, strlen(text)); }

/* The inside of a JSON string; bytes that are not plain ASCII become \u00XX. */
static void append_json(struct buffer *b, const char *text) {
    char escape[8];
    for (const unsigned char *p = (const unsigned char *)text; *p; p++)
        if (*p >= 0x20 && *p < 0x7f && *p != '"' && *p != '\\')
            append(b, p, 1);
        else
            append(b, escape, (size_t)snprintf(escape, sizeof escape, "\\u%04x", *p));
}

static int print(const struct buffer *b, int exit_code) {
    for (size_t done = 0; done < b->size;) {
        ssize_t n = write(STDOUT_FILENO, b->data + done, b->size - done);
        if (n < 0 && errno != EINTR)
            return 2;
        done += n > 0 ? (size_t)n : 0;
    }
    return exit_code;
}

/* Prints a CNI error (section 5): what is wrong with what, and what to do. */
static int fail(int code, const char *subject, const char *wrong, const char *remedy) {
    struct buffer b = {0};
    char number[16];
    snprintf(number, sizeof number, "%d", code);
    append_text(&b, "{\"cniVersion\":\"");
    append_text(&b, version);
    append_text(&b, "\",\"code\":");
    append_text(&b, number);
    append_text(&b, ",\"msg\":\"");
    append_json(&b, subject);
    append_text(&b, ": ");
    append_json(&b, wrong);
    append_text(&b, "\",\"details\":\"");
    append_json(&b, remedy);
    append_text(&b, "\"}\n");
    return print(&b, 1);
}

/* The string that starts behind the quote at `at`: its end, where the closing quote stands. */
static size_t string_end(const char *s, size_t size, size_t at) {
    while (at < size && s[at] != '"')
        at += s[at] == '\\' ? 2 : 1;
    return at < size ? at : size;
}

/* Sets `version` from the top-level "cniVersion", if it is one that we speak. */
static void find_version(const char *s, size_t size) {
    static const char key[] = "cniVersion";
    int depth = 0;
    for (size_t i = 0; i < size; i++) {
        depth += (s[i] == '{' || s[i] == '[') - (s[i] == '}' || s[i] == ']');
        if (s[i] != '"')
            continue;
        size_t start = i + 1;
        i = string_end(s, size, start);
        if (depth != 1 || i - start != sizeof key - 1 || memcmp(s + start, key, i - start))
            continue;
        size_t at = i + 1;
        while (at < size && strchr(" \t\r\n", s[at]) && s[at])
            at++;
        if (at >= size || s[at++] != ':')
            continue;
        while (at < size && strchr(" \t\r\n", s[at]) && s[at])
            at++;
        if (at >= size || s[at++] != '"')
            return;
        size_t length = string_end(s, size, at) - at;
        for (size_t v = 0; v < N_VERSIONS; v++)
            if (length == strlen(VERSIONS[v]) && !memcmp(s + at, VERSIONS[v], length))
                version = VERSIONS[v];
        return;
    }
}

/* Appends stdin. NULL, or what is wrong. */
static const char *read_stdin(struct buffer *b) {
    size_t start = b->size;
    for (;;) {
        struct pollfd p = {.fd = STDIN_FILENO, .events = POLLIN};
        int ready = poll(&p, 1, STDIN_MS);
        if (ready == 0)
            return "not closed within 5 s";
        ssize_t n = ready < 0 ? -1 : read(STDIN_FILENO, reserve(b, 65536), 65536);
        if (n < 0 && errno != EINTR && errno != EAGAIN)
            return strerror(errno);
        if (n == 0)
            return NULL;
        b->size += n > 0 ? (size_t)n : 0;
        if (b->size - start > LIMIT)
            return "longer than 1 MiB";
    }
}

/* Sends the request, the descriptor (or -1) with its first byte. 0, or -1 with errno. */
static int send_request(int s, const struct buffer *request, int descriptor) {
    union {
        struct cmsghdr align;
        char bytes[CMSG_SPACE(sizeof(int))];
    } control = {.bytes = {0}};
    for (size_t done = 0; done < request->size;) {
        struct iovec part = {request->data + done, request->size - done};
        struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1};
        if (done == 0 && descriptor >= 0) {
            message.msg_control = &control;
            message.msg_controllen = sizeof control.bytes;
            struct cmsghdr *c = CMSG_FIRSTHDR(&message);
            c->cmsg_level = SOL_SOCKET;
            c->cmsg_type = SCM_RIGHTS;
            c->cmsg_len = CMSG_LEN(sizeof(int));
            memcpy(CMSG_DATA(c), &descriptor, sizeof descriptor);
        }
        ssize_t n = sendmsg(s, &message, MSG_NOSIGNAL);
        if (n < 0 && errno != EINTR)
            return -1;
        done += n > 0 ? (size_t)n : 0;
    }
    return 0;
}

/* Appends exactly `size` bytes. 0, or -1 with errno; an early end counts as ECONNRESET. */
static int receive(int s, struct buffer *b, size_t size) {
    for (size_t end = b->size + size; b->size < end;) {
        ssize_t n = recv(s, reserve(b, end - b->size), end - b->size, 0);
        if (n == 0)
            errno = ECONNRESET;
        if (n == 0 || (n < 0 && errno != EINTR))
            return -1;
        b->size += n > 0 ? (size_t)n : 0;
    }
    return 0;
}

static uint32_t number_at(const char *data) {
    uint32_t value;
    memcpy(&value, data, sizeof value);
    return ntohl(value);
}

/* One conversation with the daemon: its exit code and, in `answer`, its words; -1 with errno. */
static int ask(const struct sockaddr_un *address, const struct buffer *request, int descriptor,
               struct buffer *answer) {
    int exit_code = -1;
    struct timeval limit = {.tv_sec = ANSWER_SECONDS};
    int s = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    answer->size = 0;
    if (s < 0)
        return -1;
    if (!setsockopt(s, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof limit) &&
        !setsockopt(s, SOL_SOCKET, SO_SNDTIMEO, &limit, sizeof limit) &&
        !connect(s, (const struct sockaddr *)address, sizeof *address) &&
        !send_request(s, request, descriptor) && !receive(s, answer, HEADER)) {
        uint32_t size = number_at(answer->data + 8);
        exit_code = (int)(number_at(answer->data + 4) & 0x7f);
        errno = EPROTO;
        if (memcmp(answer->data, "MNX1", 4) || size > LIMIT)
            exit_code = -1;
        answer->size = 0;
        if (exit_code >= 0 && receive(s, answer, size))
            exit_code = -1;
    }
    int error = errno;
    close(s);
    errno = error;
    return exit_code;
}

static int print_versions(void) {
    struct buffer b = {0};
    append_text(&b, "{\"cniVersion\":\"");
    append_text(&b, version);
    append_text(&b, "\",\"supportedVersions\":[");
    for (size_t v = 0; v < N_VERSIONS; v++) {
        append_text(&b, v ? ",\"" : "\"");
        append_text(&b, VERSIONS[v]);
        append_text(&b, "\"");
    }
    append_text(&b, "]}\n");
    return print(&b, 0);
}

int main(void) {
    extern char **environ;
    struct buffer request = {0}, answer = {0};
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    const char *command = getenv("CNI_COMMAND"), *netns = getenv("CNI_NETNS"), *path, *wrong;
    int descriptor = -1, exit_code;

    signal(SIGPIPE, SIG_IGN);
    if (!command || !*command)
        return fail(ERR_ENVIRONMENT, "CNI_COMMAND", "not set",
                    "this is a CNI plugin, to be run by a container runtime; expected ADD, DEL, "
                    "CHECK, STATUS, GC or VERSION");
    append(&request, "MNX1\0\0\0\0\0\0\0\0", HEADER);
    for (char **entry = environ; *entry; entry++)
        if (!strncmp(*entry, "CNI_", 4))
            append(&request, *entry, strlen(*entry) + 1);
    if (netns && *netns && (descriptor = open(netns, O_RDONLY | O_CLOEXEC | O_NONBLOCK)) < 0) {
        append_text(&request, "MANX_NETNS_ERROR=");
        append(&request, strerror(errno), strlen(strerror(errno)) + 1);
    }
    append_text(&request, "MANX_PLUGIN=");
    append(&request, program_invocation_short_name, strlen(program_invocation_short_name) + 1);
    size_t environment = request.size - HEADER;
    if (environment > LIMIT)
        return fail(ERR_ENVIRONMENT, "CNI_* variables", "longer than 1 MiB", "shorten CNI_ARGS");
    wrong = read_stdin(&request);
    size_t configuration = request.size - HEADER - environment;
    find_version(request.data + HEADER + environment, configuration);
    if (!strcmp(command, "VERSION"))
        return print_versions();
    if (wrong)
        return fail(ERR_IO, "stdin", wrong, "expected the network configuration as JSON");
    memcpy(request.data + 4, &(uint32_t){htonl((uint32_t)environment)}, 4);
    memcpy(request.data + 8, &(uint32_t){htonl((uint32_t)configuration)}, 4);

    path = getenv("MANX_CNI_SOCKET");
    path = path && *path ? path : MANX_CNI_SOCKET;
    if (strlen(path) >= sizeof address.sun_path)
        return fail(ERR_ENVIRONMENT, "MANX_CNI_SOCKET", path, "expected at most 107 bytes");
    memcpy(address.sun_path, path, strlen(path));
    int status = !strcmp(command, "STATUS"); /* asks about now, so it does not wait */
    for (int tries = status ? RETRIES : 0;; tries++) {
        exit_code = ask(&address, &request, descriptor, &answer);
        if (exit_code >= 0)
            return print(&answer, exit_code);
        if (tries >= RETRIES || errno == EAGAIN || errno == EPROTO)
            break;
        poll(NULL, 0, RETRY_MS);
    }
    wrong = errno == EAGAIN ? "no answer in time" : strerror(errno);
    struct buffer subject = {0};
    append_text(&subject, "daemon at ");
    append(&subject, path, strlen(path) + 1);
    return fail(status ? ERR_NOT_AVAILABLE : ERR_TRY_AGAIN, subject.data, wrong,
                "start the service manx-cni on this node (the command is: manx-cni daemon), or set "
                "MANX_CNI_SOCKET to the socket it listens on; then try again");
}

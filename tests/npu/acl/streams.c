/* Streams, events, copies, graphs.
 *
 * Work on a stream runs in order. It runs in the calling thread where the stream has nothing before it and nothing makes
 * it wait; else (a slow copy, an event that is still to come, the setting `queued`) in a thread of the stream. Operators are
 * launches: numbers that the registered runner understands (tests/npu/dispatch.py). While a stream captures, nothing runs. */
#define _GNU_SOURCE
#include "stub.h"
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum kind { COPY, FILL, RECORD, WAIT, RESET, LAUNCH, HOST, NODE, UPDATE };

struct event {
    unsigned flags;
    uint64_t asked, reached; /* records put on a stream, records that ran */
    bool set;                /* for external events: recorded and not reset since */
    struct timespec when;
    struct model *captured; /* last recorded inside this capture */
};

struct work {
    enum kind kind;
    void *to;
    const void *from;
    size_t size;
    int value;
    struct event *event;
    uint64_t ticket;
    uint64_t token; /* LAUNCH, UPDATE */
    aclrtHostFunc host;
    struct node *node; /* NODE, UPDATE */
    struct work *next;
};

struct node {
    struct work work;
    struct node *next;
};

struct group {
    struct node **nodes;
    size_t count;
    struct group *next;
};

struct model {
    uint32_t id;
    int mode;
    struct node *first, **last;
    struct group *groups;
    size_t pending; /* nodes on streams that have not run */
};

struct stream {
    int device, id;
    struct work *first, **last;
    bool busy, started, stop, delayed;
    pthread_t thread;
    int error;
    struct model *capture;
    struct group *group, *updating;
    size_t updated;
    uint32_t cores[2]; /* cube and vector; 0: all */
    struct stream *next;
};

static struct stream *streams;
static int stream_count, model_count, captures_global;
static long pieces, slow_copies;
static __thread int exchanged_mode = 0;

/* Runs launch `token` (keep: it will run again) or, with run false, forgets it. Gives 0 or the number of an error. */
typedef int (*runner)(int run, int keep, uint64_t token);
static runner registered;

void aclstubSetRunner(runner function) { registered = function; }

/* ---- the work of a stream ------------------------------------------------------------------------------------------ */

static struct stream *new_stream(int device) { /* with `lock` held */
    struct stream *s = calloc(1, sizeof *s);
    s->device = device;
    s->id = stream_count++;
    s->last = &s->first;
    s->next = streams;
    streams = s;
    return s;
}

static struct stream *of(aclrtStream handle) {
    if (handle)
        return handle;
    static struct stream *defaults[DEVICES];
    pthread_mutex_lock(&lock);
    int device = current_device() < 0 ? 0 : current_device();
    if (!defaults[device])
        defaults[device] = new_stream(device);
    pthread_mutex_unlock(&lock);
    return defaults[device];
}

static bool ready(const struct work *w) { /* with `lock` held */
    if (w->kind == NODE)
        return ready(&w->node->work);
    if (w->kind != WAIT)
        return true;
    return w->event->flags & ACL_EVENT_EXTERNAL ? w->event->set : w->event->reached >= w->ticket;
}

static int run(struct stream *s, struct work *w, bool keep) { /* without `lock` */
    switch (w->kind) {
    case COPY:
        if (settings()->copy_ms) {
            struct timespec pause = {settings()->copy_ms / 1000, settings()->copy_ms % 1000 * 1000000};
            nanosleep(&pause, NULL);
        }
        memmove(w->to, w->from, w->size);
        return OK;
    case FILL:
        memset(w->to, w->value, w->size);
        return OK;
    case RECORD:
        pthread_mutex_lock(&lock);
        clock_gettime(CLOCK_MONOTONIC, &w->event->when);
        w->event->reached = w->ticket ? w->ticket : ++w->event->asked; /* a captured record has a ticket at each replay */
        w->event->set = true;
        pthread_cond_broadcast(&changed);
        pthread_mutex_unlock(&lock);
        return OK;
    case RESET:
        pthread_mutex_lock(&lock);
        w->event->set = false;
        pthread_mutex_unlock(&lock);
        return OK;
    case WAIT:
        return OK;
    case HOST:
        w->host(w->to);
        return OK;
    case LAUNCH:
        return registered ? registered(1, keep, w->token) : fail(OPERATOR_MISSING, "no one runs operators here");
    case NODE: {
        int error = run(s, &w->node->work, true);
        return error;
    }
    case UPDATE: {
        pthread_mutex_lock(&lock);
        uint64_t old = w->node->work.token;
        w->node->work.token = w->token;
        pthread_mutex_unlock(&lock);
        if (registered)
            registered(0, 0, old);
        return OK;
    }
    }
    return OK;
}

static void ran(struct stream *s, struct model *model, int error) { /* with `lock` held */
    s->busy = false;
    if (error && !s->error)
        s->error = error;
    if (model)
        model->pending--;
    pthread_cond_broadcast(&changed);
}

static struct model *model_of(const struct work *w) { return w->kind == NODE ? (struct model *)w->to : NULL; }

static void *work_off(void *argument) {
    struct stream *s = argument;
    pthread_mutex_lock(&lock);
    while (!s->stop) {
        struct work *w = s->first;
        if (!w || s->busy || (!ready(w) && !lost(s->device))) {
            pthread_cond_wait(&changed, &lock);
            continue;
        }
        s->first = w->next;
        if (!s->first)
            s->last = &s->first;
        s->busy = true;
        pthread_mutex_unlock(&lock);
        int error = lost(s->device) ? DEVICE_LOST : run(s, w, false);
        pthread_mutex_lock(&lock);
        ran(s, model_of(w), error);
        free(w);
    }
    pthread_mutex_unlock(&lock);
    return NULL;
}

/* Waits until the stream's work has run; gives and forgets its error. With `lock` held. */
static int drain(struct stream *s) {
    while ((s->first || s->busy) && !lost(s->device))
        pthread_cond_wait(&changed, &lock);
    int error = lost(s->device) ? DEVICE_LOST : s->error;
    s->error = OK;
    return error;
}

static int check(const struct stream *s) {
    return lost(s->device) ? fail(DEVICE_LOST, "device %d is lost", s->device) : OK;
}

static void append(struct stream *s, const struct work *w) { /* to the capture; with `lock` held */
    struct node *n = calloc(1, sizeof *n);
    n->work = *w;
    *s->capture->last = n;
    s->capture->last = &n->next;
    if (s->group && w->kind == LAUNCH) {
        struct group *g = s->group;
        g->nodes = realloc(g->nodes, (g->count + 1) * sizeof *g->nodes);
        g->nodes[g->count++] = n;
    }
}

/* Puts work on a stream. An error of work that ran at once is given back; of other work, at a later synchronisation. */
static int submit(struct stream *s, struct work w) {
    const struct settings *o = settings();
    pthread_mutex_lock(&lock);
    if (o->lose_after && ++pieces == o->lose_after) {
        pthread_mutex_unlock(&lock);
        void aclstubLoseDevice(int device);
        aclstubLoseDevice(s->device);
        pthread_mutex_lock(&lock);
    }
    if (lost(s->device)) {
        pthread_mutex_unlock(&lock);
        return fail(DEVICE_LOST, "device %d is lost", s->device);
    }
    if (s->capture) {
        append(s, &w);
        pthread_mutex_unlock(&lock);
        return OK;
    }
    struct model *model = model_of(&w);
    if (model)
        model->pending++;
    enum kind kind = w.kind == NODE ? w.node->work.kind : w.kind;
    bool slow = o->queued || (kind == COPY && o->copy_ms);
    if (!s->first && !s->busy && !slow && ready(&w)) {
        s->busy = true;
        pthread_mutex_unlock(&lock);
        int error = run(s, &w, false);
        pthread_mutex_lock(&lock);
        ran(s, model, OK);
        pthread_mutex_unlock(&lock);
        return error;
    }
    struct work *queued = malloc(sizeof *queued);
    *queued = w;
    queued->next = NULL;
    *s->last = queued;
    s->last = &queued->next;
    if (!s->started) {
        s->started = true;
        pthread_create(&s->thread, NULL, work_off, s);
    }
    pthread_cond_broadcast(&changed);
    pthread_mutex_unlock(&lock);
    return OK;
}

/* What a launch on this stream would be: 0 work that runs, 1 part of a capture, 2 an update of a captured task group. */
int aclstubState(aclrtStream handle) {
    struct stream *s = of(handle);
    return s->updating ? 2 : s->capture ? 1 : 0;
}

int aclstubLaunch(aclrtStream handle, uint64_t token) {
    struct stream *s = of(handle);
    if (s->updating) {
        struct group *g = s->updating;
        if (s->updated >= g->count)
            return fail(UPDATE_MISMATCH, "the task group has %zu operators, this is one more", g->count);
        count(UPDATES);
        return submit(s, (struct work){.kind = UPDATE, .node = g->nodes[s->updated++], .token = token});
    }
    count(LAUNCHES);
    return submit(s, (struct work){.kind = LAUNCH, .token = token});
}

/* For the end of the process: waits for all streams, then forgets the runner. */
void aclstubQuiet(void) {
    void *python = let_go_of_python();
    pthread_mutex_lock(&lock);
    for (struct stream *s = streams; s; s = s->next) {
        bool stuck = s->first && !s->busy && !ready(s->first);
        if (!stuck)
            drain(s);
    }
    pthread_mutex_unlock(&lock);
    take_python_back(python);
    registered = NULL;
}

/* ---- streams ------------------------------------------------------------------------------------------------------- */

aclError aclrtCreateStreamWithConfig(aclrtStream *out, uint32_t priority, uint32_t flags) {
    if (current_device() < 0)
        return fail(NO_CONTEXT, "this thread has set no device");
    pthread_mutex_lock(&lock);
    *out = new_stream(current_device());
    pthread_mutex_unlock(&lock);
    return OK;
}

aclError aclrtCreateStream(aclrtStream *out) { return aclrtCreateStreamWithConfig(out, 0, 0); }

aclError aclrtSetStreamResLimit(aclrtStream handle, aclrtDevResLimitType type, uint32_t value) {
    if (type < 0 || type > 1 || !value || value > 24)
        return fail(BAD_PARAMETER, "a stream can't have %u cores of type %d", value, type);
    of(handle)->cores[type] = value;
    return OK;
}

aclError aclrtGetStreamResLimit(aclrtStream handle, aclrtDevResLimitType type, uint32_t *value) {
    *value = of(handle)->cores[type] ? of(handle)->cores[type] : 24;
    return OK;
}

aclError aclrtDestroyStream(aclrtStream handle) {
    struct stream *s = handle;
    void *python = let_go_of_python();
    pthread_mutex_lock(&lock);
    drain(s);
    s->stop = true;
    for (struct stream **at = &streams; *at; at = &(*at)->next)
        if (*at == s) {
            *at = s->next;
            break;
        }
    pthread_cond_broadcast(&changed);
    pthread_mutex_unlock(&lock);
    if (s->started)
        pthread_join(s->thread, NULL);
    take_python_back(python);
    free(s);
    return OK;
}

aclError aclrtDestroyStreamForce(aclrtStream handle) { return aclrtDestroyStream(handle); }

bool capturing(void) { return captures_global && exchanged_mode == 0; }

static int refuse_while_capturing(const struct stream *s) {
    if ((s && s->capture) || capturing())
        return fail(NOT_WHILE_CAPTURING, "waiting is not possible while a graph is being captured");
    return OK;
}

static int synchronise(struct stream *s) {
    int error = refuse_while_capturing(s);
    if (error)
        return error;
    void *python = let_go_of_python();
    pthread_mutex_lock(&lock);
    error = drain(s);
    pthread_mutex_unlock(&lock);
    take_python_back(python);
    return error;
}

aclError aclrtSynchronizeStreamWithTimeout(aclrtStream handle, int32_t timeout) {
    count(STREAM_SYNCHRONISATIONS);
    return synchronise(of(handle));
}

aclError aclrtSynchronizeStream(aclrtStream handle) { return aclrtSynchronizeStreamWithTimeout(handle, -1); }

aclError aclrtSynchronizeDeviceWithTimeout(int32_t timeout) {
    count(DEVICE_SYNCHRONISATIONS);
    int error = refuse_while_capturing(NULL), first = OK;
    if (error)
        return error;
    void *python = let_go_of_python();
    pthread_mutex_lock(&lock);
    for (struct stream *s = streams; s; s = s->next)
        if (s->device == current_device()) {
            error = drain(s);
            first = first ? first : error;
        }
    pthread_mutex_unlock(&lock);
    take_python_back(python);
    return first ? first : lost(current_device()) ? DEVICE_LOST : OK;
}

aclError aclrtSynchronizeDevice(void) { return aclrtSynchronizeDeviceWithTimeout(-1); }

aclError aclrtStreamQuery(aclrtStream handle, aclrtStreamStatus *status) {
    struct stream *s = of(handle);
    pthread_mutex_lock(&lock);
    *status = s->first || s->busy ? ACL_STREAM_STATUS_NOT_READY : ACL_STREAM_STATUS_COMPLETE;
    pthread_mutex_unlock(&lock);
    return check(s);
}

aclError aclrtStreamGetId(aclrtStream handle, int32_t *id) {
    *id = of(handle)->id;
    return OK;
}

aclError aclrtLaunchHostFunc(aclrtStream handle, aclrtHostFunc function, void *argument) {
    return submit(of(handle), (struct work){.kind = HOST, .host = function, .to = argument});
}

aclError aclrtLaunchCallback(aclrtCallback function, void *argument, aclrtCallbackBlockType block, aclrtStream handle) {
    return submit(of(handle), (struct work){.kind = HOST, .host = (aclrtHostFunc)function, .to = argument});
}

/* ---- events -------------------------------------------------------------------------------------------------------- */

aclError aclrtCreateEventExWithFlag(aclrtEvent *out, uint32_t flags) {
    struct event *e = calloc(1, sizeof *e);
    e->flags = flags;
    *out = e;
    return OK;
}

aclError aclrtCreateEventWithFlag(aclrtEvent *out, uint32_t flags) { return aclrtCreateEventExWithFlag(out, flags); }

/* A record or a wait that is still on a stream holds on to its event: such events are left to leak. */
aclError aclrtDestroyEvent(aclrtEvent handle) {
    struct event *e = handle;
    pthread_mutex_lock(&lock);
    bool used = e->reached < e->asked || e->captured || e->flags & ACL_EVENT_EXTERNAL;
    for (struct stream *s = streams; s; s = s->next)
        used |= s->first != NULL;
    pthread_mutex_unlock(&lock);
    if (!used)
        free(e);
    return OK;
}

aclError aclrtRecordEvent(aclrtEvent handle, aclrtStream stream) {
    struct event *e = handle;
    struct stream *s = of(stream);
    pthread_mutex_lock(&lock);
    bool external = e->flags & ACL_EVENT_EXTERNAL;
    if (s->capture && !external) { /* orders streams inside the capture, whose work is in one order anyway */
        e->captured = s->capture;
        pthread_mutex_unlock(&lock);
        return OK;
    }
    e->captured = NULL;
    uint64_t ticket = s->capture ? 0 : ++e->asked;
    pthread_mutex_unlock(&lock);
    return submit(s, (struct work){.kind = RECORD, .event = e, .ticket = ticket});
}

aclError aclrtResetEvent(aclrtEvent handle, aclrtStream stream) {
    return submit(of(stream), (struct work){.kind = RESET, .event = handle});
}

aclError aclrtStreamWaitEvent(aclrtStream stream, aclrtEvent handle) {
    struct event *e = handle;
    struct stream *s = of(stream);
    pthread_mutex_lock(&lock);
    bool external = e->flags & ACL_EVENT_EXTERNAL;
    if (e->captured && !external) { /* the waiting stream joins the capture */
        if (!s->capture)
            s->capture = e->captured;
        pthread_mutex_unlock(&lock);
        return OK;
    }
    if (s->capture && !external && e->reached < e->asked) {
        pthread_mutex_unlock(&lock);
        return fail(NOT_WHILE_CAPTURING, "a capture can't wait for an event that was recorded outside it");
    }
    uint64_t ticket = e->asked;
    bool nothing = s->capture && !external;
    pthread_mutex_unlock(&lock);
    return nothing ? OK : submit(s, (struct work){.kind = WAIT, .event = e, .ticket = ticket});
}

aclError aclrtSynchronizeEvent(aclrtEvent handle) {
    struct event *e = handle;
    count(EVENT_SYNCHRONISATIONS);
    if (e->captured)
        return fail(NOT_WHILE_CAPTURING, "an event of a capture can't be waited for");
    int device = current_device();
    void *python = let_go_of_python();
    pthread_mutex_lock(&lock);
    uint64_t ticket = e->asked;
    while (e->reached < ticket && !lost(device))
        pthread_cond_wait(&changed, &lock);
    int error = lost(device) ? DEVICE_LOST : OK;
    /* What failed before the event is told here, as the device would. */
    for (struct stream *s = streams; s && !error; s = s->next)
        if (s->device == device && s->error) {
            error = s->error;
            s->error = OK;
        }
    pthread_mutex_unlock(&lock);
    take_python_back(python);
    return error;
}

aclError aclrtQueryEventStatus(aclrtEvent handle, aclrtEventRecordedStatus *status) {
    struct event *e = handle;
    pthread_mutex_lock(&lock);
    *status = e->reached >= e->asked ? ACL_EVENT_RECORDED_STATUS_COMPLETE : ACL_EVENT_RECORDED_STATUS_NOT_READY;
    pthread_mutex_unlock(&lock);
    return lost(current_device()) ? DEVICE_LOST : OK;
}

aclError aclrtQueryEventWaitStatus(aclrtEvent handle, aclrtEventWaitStatus *status) {
    aclrtEventRecordedStatus recorded;
    aclError error = aclrtQueryEventStatus(handle, &recorded);
    *status = recorded == ACL_EVENT_RECORDED_STATUS_COMPLETE ? ACL_EVENT_WAIT_STATUS_COMPLETE : ACL_EVENT_WAIT_STATUS_NOT_READY;
    return error;
}

aclError aclrtEventElapsedTime(float *ms, aclrtEvent from, aclrtEvent to) {
    struct event *a = from, *b = to;
    pthread_mutex_lock(&lock);
    bool done = a->reached && b->reached && a->reached >= a->asked && b->reached >= b->asked;
    *ms = (b->when.tv_sec - a->when.tv_sec) * 1e3f + (b->when.tv_nsec - a->when.tv_nsec) / 1e6f;
    pthread_mutex_unlock(&lock);
    return done ? OK : fail(EVENT_UNFINISHED, "an event has not been reached yet");
}

aclError aclrtEventGetTimestamp(aclrtEvent handle, uint64_t *microseconds) {
    struct event *e = handle;
    *microseconds = e->when.tv_sec * 1000000ull + e->when.tv_nsec / 1000;
    return OK;
}

/* Another process gets an event that has been reached: the exporter waits for that. */
aclError aclrtIpcGetEventHandle(aclrtEvent handle, aclrtIpcEventHandle *out) {
    struct event *e = handle;
    void *python = let_go_of_python();
    pthread_mutex_lock(&lock);
    while (e->reached < e->asked && !lost(current_device()))
        pthread_cond_wait(&changed, &lock);
    pthread_mutex_unlock(&lock);
    take_python_back(python);
    memset(out, 0, sizeof *out);
    return OK;
}

aclError aclrtIpcOpenEventHandle(aclrtIpcEventHandle handle, aclrtEvent *out) { return aclrtCreateEventExWithFlag(out, 0); }

/* ---- copies -------------------------------------------------------------------------------------------------------- */

static int way(aclrtMemcpyKind kind) { /* 0 to the device, 1 to the host, 2 on the device */
    return kind == ACL_MEMCPY_HOST_TO_DEVICE ? 0 : kind == ACL_MEMCPY_DEVICE_TO_HOST ? 1 : 2;
}

aclError aclrtMemcpy(void *to, size_t room, const void *from, size_t size, aclrtMemcpyKind kind) {
    int error = refuse_while_capturing(NULL);
    if (error)
        return error;
    if (lost(current_device()))
        return fail(DEVICE_LOST, "device %d is lost", current_device());
    if (size > room)
        return fail(BAD_PARAMETER, "%zu bytes are copied to where %zu are", size, room);
    count(COPIES_TO_DEVICE + way(kind));
    memmove(to, from, size);
    return OK;
}

aclError aclrtMemcpyAsync(void *to, size_t room, const void *from, size_t size, aclrtMemcpyKind kind, aclrtStream stream) {
    if (size > room)
        return fail(BAD_PARAMETER, "%zu bytes are copied to where %zu are", size, room);
    count(ASYNC_COPIES_TO_DEVICE + way(kind));
    if (way(kind) != 2 && !pinned(way(kind) == 0 ? from : to))
        count(PAGEABLE_COPIES);
    pthread_mutex_lock(&lock);
    bool fails = settings()->copy_fails_after && ++slow_copies == settings()->copy_fails_after;
    pthread_mutex_unlock(&lock);
    if (fails)
        return fail(DRIVER_FAILED, "a copy of %zu bytes failed", size);
    return submit(of(stream), (struct work){.kind = COPY, .to = to, .from = from, .size = size});
}

aclError aclrtMemset(void *at, size_t room, int32_t value, size_t size) {
    if (size > room)
        return fail(BAD_PARAMETER, "%zu bytes are set where %zu are", size, room);
    memset(at, value, size);
    return OK;
}

aclError aclrtMemsetAsync(void *at, size_t room, int32_t value, size_t size, aclrtStream stream) {
    if (size > room)
        return fail(BAD_PARAMETER, "%zu bytes are set where %zu are", size, room);
    return submit(of(stream), (struct work){.kind = FILL, .to = at, .value = value, .size = size});
}

/* ---- graphs -------------------------------------------------------------------------------------------------------- */

aclError aclmdlRICaptureBegin(aclrtStream stream, aclmdlRICaptureMode mode) {
    struct stream *s = of(stream);
    if (s->capture)
        return fail(STREAM_CAPTURED, "the stream captures already");
    struct model *m = calloc(1, sizeof *m);
    m->mode = mode;
    m->last = &m->first;
    pthread_mutex_lock(&lock);
    m->id = ++model_count;
    s->capture = m;
    captures_global += mode == 0;
    pthread_mutex_unlock(&lock);
    return OK;
}

aclError aclmdlRICaptureEnd(aclrtStream stream, aclmdlRI *out) {
    struct model *m = of(stream)->capture;
    if (!m)
        return fail(NOT_CAPTURED, "the stream does not capture");
    pthread_mutex_lock(&lock);
    for (struct stream *s = streams; s; s = s->next)
        if (s->capture == m)
            s->capture = NULL;
    captures_global -= m->mode == 0;
    pthread_mutex_unlock(&lock);
    *out = m;
    return OK;
}

aclError aclmdlRICaptureGetInfo(aclrtStream stream, aclmdlRICaptureStatus *status, aclmdlRI *out) {
    struct model *m = of(stream)->capture;
    *status = m ? ACL_MODEL_RI_CAPTURE_STATUS_ACTIVE : ACL_MODEL_RI_CAPTURE_STATUS_NONE;
    if (out)
        *out = m;
    return OK;
}

aclError aclmdlRICaptureThreadExchangeMode(aclmdlRICaptureMode *mode) {
    int old = exchanged_mode;
    exchanged_mode = *mode;
    *mode = old;
    return OK;
}

aclError aclmdlRICaptureTaskGrpBegin(aclrtStream stream) {
    struct stream *s = of(stream);
    if (!s->capture || s->group)
        return fail(NOT_CAPTURED, "a task group begins inside a capture and outside another group");
    s->group = calloc(1, sizeof *s->group);
    s->group->next = s->capture->groups;
    s->capture->groups = s->group;
    return OK;
}

aclError aclmdlRICaptureTaskGrpEnd(aclrtStream stream, aclrtTaskGrp *out) {
    struct stream *s = of(stream);
    if (!s->group)
        return fail(NOT_CAPTURED, "no task group has begun");
    *out = s->group;
    s->group = NULL;
    return OK;
}

aclError aclmdlRICaptureTaskUpdateBegin(aclrtStream stream, aclrtTaskGrp group) {
    struct stream *s = of(stream);
    if (s->capture || s->updating)
        return fail(STREAM_CAPTURED, "an update begins outside a capture and another update");
    s->updating = group;
    s->updated = 0;
    return OK;
}

aclError aclmdlRICaptureTaskUpdateEnd(aclrtStream stream) {
    struct stream *s = of(stream);
    struct group *g = s->updating;
    s->updating = NULL;
    if (!g || s->updated != g->count)
        return fail(UPDATE_MISMATCH, "%zu operators of a task group of %zu were updated", s->updated, g ? g->count : 0);
    return OK;
}

aclError aclmdlRIExecuteAsync(aclmdlRI handle, aclrtStream stream) {
    struct model *m = handle;
    struct stream *s = of(stream);
    count(REPLAYS);
    int error = check(s);
    for (struct node *n = m->first; n && !error; n = n->next)
        error = submit(s, (struct work){.kind = NODE, .node = n, .to = m});
    return error;
}

aclError aclmdlRIDestroy(aclmdlRI handle) {
    struct model *m = handle;
    void *python = let_go_of_python();
    pthread_mutex_lock(&lock);
    while (m->pending)
        pthread_cond_wait(&changed, &lock);
    pthread_mutex_unlock(&lock);
    take_python_back(python);
    for (struct node *n = m->first, *next; n; n = next) {
        next = n->next;
        if (n->work.kind == LAUNCH && registered)
            registered(0, 0, n->work.token);
        free(n);
    }
    for (struct group *g = m->groups, *next; g; g = next) {
        next = g->next;
        free(g->nodes);
        free(g);
    }
    free(m);
    return OK;
}

aclError aclmdlRIGetId(aclmdlRI handle, uint32_t *id) {
    *id = ((struct model *)handle)->id;
    return OK;
}

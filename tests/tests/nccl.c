// A stand-in for NCCL whose ranks are threads of one process and whose GPUs are emulated: device memory is memory of the
// process, and a stream's work is done when the call that enqueues it returns. Sums go from the last rank to the first, since
// NCCL promises no order.
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { SUCCESS, INTERNAL = 3, ARGUMENT = 4, USAGE = 5, REMOTE = 6 };
enum { SEND, RECV, BROADCAST, REDUCE, ALL_REDUCE, REDUCE_SCATTER, ALL_GATHER };
enum { RANKS = 16, CALLS = 64, WORLDS = 256 };

typedef struct { char bytes[128]; } Id;
typedef struct { int op, type, peer; const char *from; char *to; size_t count; } Call;
typedef struct {
    Id id;
    int size, joined, here, dead;
    long round;
    Call calls[RANKS][CALLS];
    int count[RANKS];
} World;
typedef struct { World *world; int rank, failing; } Comm;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t changed = PTHREAD_COND_INITIALIZER;
static World *worlds[WORLDS];
static int made, next_call, next_async, destroyed, aborted;
static __thread int depth;
static __thread Comm *queued_by;
static __thread Call queued[CALLS];
static __thread int queued_count;

// What the next collective of any rank answers; what its communicator says later.
void fake_fails(int call, int async) { next_call = call, next_async = async; }
int fake_destroyed(void) { return destroyed; }
int fake_aborted(void) { return aborted; }

static size_t size_of(int type) {
    switch (type) {
    case 0: case 1: return 1;
    case 6: case 9: return 2;
    case 4: case 5: case 8: return 8;
    default: return 4;
    }
}

static double read_at(const char *at, int type) {
    uint16_t half;
    uint32_t word;
    float single;
    double wide;
    _Float16 f16;
    switch (type) {
    case 6: memcpy(&f16, at, 2); return (double)f16;
    case 7: memcpy(&single, at, 4); return single;
    case 8: memcpy(&wide, at, 8); return wide;
    case 9: memcpy(&half, at, 2); word = (uint32_t)half << 16; memcpy(&single, &word, 4); return single;
    default: memcpy(&word, at, 4); return word;
    }
}

static void write_at(char *at, int type, float value, double wide) {
    uint32_t word;
    uint16_t half;
    _Float16 f16 = (_Float16)value;
    switch (type) {
    case 6: memcpy(at, &f16, 2); break;
    case 7: memcpy(at, &value, 4); break;
    case 8: memcpy(at, &wide, 8); break;
    case 9:
        memcpy(&word, &value, 4);
        half = (uint16_t)((word + 0x7fff + ((word >> 16) & 1)) >> 16);
        memcpy(at, &half, 2);
        break;
    default: word = (uint32_t)wide; memcpy(at, &word, 4);
    }
}

// All ranks of a world meet; 0 when one of them has given up.
static int meet(World *world) {
    long round = world->round;
    if (++world->here == world->size) {
        world->here = 0, world->round++;
        pthread_cond_broadcast(&changed);
    }
    while (world->round == round && !world->dead) pthread_cond_wait(&changed, &lock);
    return world->round != round;
}

// What one rank's call writes, in memory of its own.
static char *result(World *world, int rank, int at, size_t *bytes) {
    Call *call = &world->calls[rank][at];
    size_t size = size_of(call->type), n = call->count * size;
    int ranks = world->size;
    *bytes = n;
    if (call->op == SEND || (call->op == REDUCE && call->peer != rank)) return NULL;
    char *out = malloc(n * (call->op == ALL_GATHER ? ranks : 1) + 1);
    if (call->op == RECV) {
        // The peer's send to this rank of the same place among its sends to it.
        int place = 0, seen = 0;
        for (int i = 0; i < at; i++) place += world->calls[rank][i].op == RECV && world->calls[rank][i].peer == call->peer;
        for (int i = 0; i < world->count[call->peer]; i++) {
            Call *other = &world->calls[call->peer][i];
            if (other->op == SEND && other->peer == rank && seen++ == place) memcpy(out, other->from, n);
        }
        return out;
    }
    if (call->op == BROADCAST) memcpy(out, world->calls[call->peer][at].from, n);
    if (call->op == ALL_GATHER) {
        for (int r = 0; r < ranks; r++) memcpy(out + r * n, world->calls[r][at].from, n);
        *bytes = n * ranks;
    }
    if (call->op == REDUCE || call->op == ALL_REDUCE || call->op == REDUCE_SCATTER) {
        size_t start = call->op == REDUCE_SCATTER ? rank * n : 0;
        for (size_t i = 0; i < n; i += size) {
            float sum = 0;
            double wide = 0;
            for (int r = ranks - 1; r >= 0; r--) {
                double value = read_at(world->calls[r][at].from + start + i, call->type);
                sum += (float)value, wide += value;
            }
            write_at(out + i, call->type, sum, wide);
        }
    }
    return out;
}

static int run(Comm *comm, const Call *calls, int count) {
    World *world = comm->world;
    char *results[CALLS];
    size_t bytes[CALLS];
    int code = REMOTE;
    pthread_mutex_lock(&lock);
    if (next_async) comm->failing = next_async, next_async = 0;
    if (next_call) {
        code = next_call, next_call = 0;
        pthread_mutex_unlock(&lock);
        return code;
    }
    memcpy(world->calls[comm->rank], calls, count * sizeof *calls);
    world->count[comm->rank] = count;
    if (!world->dead && meet(world)) {
        for (int i = 0; i < count; i++) results[i] = result(world, comm->rank, i, &bytes[i]);
        int all = meet(world);
        for (int i = 0; i < count; i++) {
            if (results[i] && all) memcpy(calls[i].to, results[i], bytes[i]);
            free(results[i]);
        }
        code = all ? SUCCESS : REMOTE;
    }
    pthread_mutex_unlock(&lock);
    return code;
}

static int enqueue(int op, const void *from, void *to, size_t count, int type, int peer, Comm *comm) {
    Call call = { op, type, peer, from, to, count };
    if (!comm) return ARGUMENT;
    if (!depth) return op <= RECV ? USAGE : run(comm, &call, 1);
    if (queued_count == CALLS) return INTERNAL;
    queued[queued_count++] = call, queued_by = comm;
    return SUCCESS;
}

int ncclGetUniqueId(Id *id) {
    pthread_mutex_lock(&lock);
    memset(id, 0, sizeof *id);
    memcpy(id->bytes, "fake", 4);
    memcpy(id->bytes + 64, &made, sizeof made);
    made++;
    pthread_mutex_unlock(&lock);
    return SUCCESS;
}

int ncclCommInitRank(Comm **out, int size, Id id, int rank) {
    if (size < 1 || size > RANKS || rank < 0 || rank >= size) return ARGUMENT;
    pthread_mutex_lock(&lock);
    int at = 0;
    while (worlds[at] && memcmp(&worlds[at]->id, &id, sizeof id)) at++;
    if (!worlds[at]) {
        worlds[at] = calloc(1, sizeof(World));
        worlds[at]->id = id, worlds[at]->size = size;
    }
    World *world = worlds[at];
    int code = world->size == size && world->joined < size ? SUCCESS : ARGUMENT;
    if (code == SUCCESS) {
        world->joined++;
        *out = calloc(1, sizeof(Comm));
        (*out)->world = world, (*out)->rank = rank;
        if (!meet(world)) code = REMOTE;
    }
    pthread_mutex_unlock(&lock);
    return code;
}

int ncclCommDestroy(Comm *comm) {
    pthread_mutex_lock(&lock);
    destroyed++;
    pthread_mutex_unlock(&lock);
    free(comm);
    return SUCCESS;
}

int ncclCommAbort(Comm *comm) {
    pthread_mutex_lock(&lock);
    aborted++;
    comm->world->dead = 1;
    pthread_cond_broadcast(&changed);
    pthread_mutex_unlock(&lock);
    return SUCCESS;
}

int ncclCommGetAsyncError(Comm *comm, int *code) {
    pthread_mutex_lock(&lock);
    *code = comm->failing;
    pthread_mutex_unlock(&lock);
    return SUCCESS;
}

const char *ncclGetErrorString(int code) {
    static const char *const all[] = { "no error", "unhandled cuda error", "unhandled system error", "internal error",
                                       "invalid argument", "invalid usage", "remote process exited or there was a network error" };
    return code >= 0 && code <= REMOTE ? all[code] : "unknown result code";
}

const char *ncclGetLastError(Comm *comm) { return comm ? "the fake says so" : ""; }

int ncclBroadcast(const void *from, void *to, size_t n, int type, int root, Comm *comm, void *stream) {
    (void)stream;
    return enqueue(BROADCAST, from, to, n, type, root, comm);
}

int ncclReduce(const void *from, void *to, size_t n, int type, int op, int root, Comm *comm, void *stream) {
    (void)stream;
    return op ? ARGUMENT : enqueue(REDUCE, from, to, n, type, root, comm);
}

int ncclAllReduce(const void *from, void *to, size_t n, int type, int op, Comm *comm, void *stream) {
    (void)stream;
    return op ? ARGUMENT : enqueue(ALL_REDUCE, from, to, n, type, 0, comm);
}

int ncclReduceScatter(const void *from, void *to, size_t n, int type, int op, Comm *comm, void *stream) {
    (void)stream;
    return op ? ARGUMENT : enqueue(REDUCE_SCATTER, from, to, n, type, 0, comm);
}

int ncclAllGather(const void *from, void *to, size_t n, int type, Comm *comm, void *stream) {
    (void)stream;
    return enqueue(ALL_GATHER, from, to, n, type, 0, comm);
}

int ncclSend(const void *from, size_t n, int type, int peer, Comm *comm, void *stream) {
    (void)stream;
    return enqueue(SEND, from, NULL, n, type, peer, comm);
}

int ncclRecv(void *to, size_t n, int type, int peer, Comm *comm, void *stream) {
    (void)stream;
    return enqueue(RECV, NULL, to, n, type, peer, comm);
}

int ncclGroupStart(void) {
    depth++;
    return SUCCESS;
}

int ncclGroupEnd(void) {
    if (!depth) return USAGE;
    if (--depth || !queued_count) return SUCCESS;
    int count = queued_count;
    queued_count = 0;
    return run(queued_by, queued, count);
}

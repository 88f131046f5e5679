/* The emulator's scheduler and runtime: see emulate.h. */
#include "tests/gpu/emulate.h"

#include <elf.h>
#include <fcntl.h>
#include <pthread.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#else
#define ASAN_UNPOISON_MEMORY_REGION(at, bytes)
#endif

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace {

enum { THREADS_MOST = 1024, WARP = 32, STACK = 256 << 10, COPIES_MOST = 4096 };
const size_t SHARED_MOST = 256 << 10, MEMORY = (size_t)8 << 30;

enum state { FREE, READY, AT_BARRIER, AT_COLLECTIVE };

struct copy {
    void *to;
    const void *from;
    int bytes;
    bool valid;
    int group;
};

struct fiber {
    void *stack_pointer;
    char *stack;
    state now;
    uint3 index;
    int number;
    const char *waits_at;
    int value; /* brought to the barrier, then its answer */
    copy *copies;
    int copies_count, copies_room, group;
};

/* Lanes that wait for each other. */
struct meeting {
    unsigned mask, here;
    usli_emulated_collective run;
    void *lanes[WARP];
};

struct warp {
    meeting meetings[WARP];
    int count;
};

fiber fibers[THREADS_MOST];
warp warps[THREADS_MOST / WARP];
fiber *self;
void *scheduler; /* its stack pointer */
int ready[THREADS_MOST], ready_count;
int threads, alive, at_barrier, barrier_sum;
bool latest_first, faulty;
uint64_t seed;
void (*thread_run)(void *);
void *thread_call;
const char *kernel_name;
char *shared_block, *shared_end; /* shared_end is followed by a page that nobody may touch */
char *shared_now;
cudaError_t last_error;
char fault_text[512];
size_t memory_used;
long long ticks;
pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

uint32_t draw(uint32_t below) {
    seed = seed * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)((seed >> 32) * below >> 32);
}

/* ---- Fibers ------------------------------------------------------------------------------------------------------ */

#if defined(__x86_64__)
/* Keeps what a called function must keep on the old stack, takes up the new one. */
__attribute__((naked, noinline)) void switch_stack(void **, void *) {
    __asm__("pushq %rbp\n pushq %rbx\n pushq %r12\n pushq %r13\n pushq %r14\n pushq %r15\n"
            "movq %rsp, (%rdi)\n movq %rsi, %rsp\n"
            "popq %r15\n popq %r14\n popq %r13\n popq %r12\n popq %rbx\n popq %rbp\n ret\n");
}
void *new_stack(char *end, void (*entry)()) {
    void **top = (void **)end - 3; /* as after a call: 8 beyond a multiple of 16 */
    *top = nullptr;
    *--top = (void *)entry;
    return top - 6;
}
#else
#include <ucontext.h>
void switch_stack(void **from, void *to) {
    ucontext_t here;
    *from = &here;
    swapcontext(&here, (ucontext_t *)to);
}
void *new_stack(char *end, void (*entry)()) {
    ucontext_t *context = (ucontext_t *)end - 1;
    getcontext(context);
    context->uc_stack.ss_sp = end - STACK / 2;
    context->uc_stack.ss_size = STACK / 2 - sizeof *context;
    makecontext(context, entry, 0);
    return context;
}
#endif

/* Either a warp runs as far ahead of the others as it can, or all go on at about the same pace. */
fiber *next() {
    int at = latest_first ? ready_count - 1 : (int)draw((uint32_t)ready_count);
    fiber *f = &fibers[ready[at]];
    ready[at] = ready[--ready_count];
    return f;
}

/* The running fiber has said what it waits for, or is ready: another goes on. */
void leave() {
    fiber *own = self;
    if (!ready_count) {
        switch_stack(&own->stack_pointer, scheduler);
        return;
    }
    self = next();
    threadIdx = self->index;
    if (self != own) switch_stack(&own->stack_pointer, self->stack_pointer);
}

/* A fiber lives on from block to block. */
void fiber_main() {
    for (;;) {
        thread_run(thread_call);
        self->now = FREE;
        alive--;
        leave();
    }
}

void make_fiber(fiber *f) {
    if (!f->stack) {
        f->stack =
            (char *)mmap(nullptr, STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (f->stack == MAP_FAILED) abort();
        mprotect(f->stack, 4096, PROT_NONE); /* a stack that overflows stops here */
    }
    ASAN_UNPOISON_MEMORY_REGION(f->stack + 4096, STACK - 4096); /* of a thread that never returned */
    /* Tops at the same distance would all want the same lines of the cache. */
    f->stack_pointer = new_stack(f->stack + STACK - (f - fibers) * 192 % (64 << 10), fiber_main);
}

void make_ready(int number) {
    fibers[number].now = READY;
    ready[ready_count++] = number;
}

const char *whereabouts(const fiber *f) {
    return f->now == FREE ? "has returned" : f->waits_at;
}

/* Nobody can go on, but not all have returned. */
void report_deadlock() {
    fiber *waiting = nullptr, *other = nullptr;
    for (int i = threads - 1; i >= 0; i--)
        if (fibers[i].now != FREE) waiting = &fibers[i];
    for (int i = threads - 1; i >= 0; i--)
        if (whereabouts(&fibers[i]) != whereabouts(waiting)) other = &fibers[i];
    self = waiting;
    threadIdx = self->index;
    if (other)
        usli_emulated_fault("waits for ever at %s: thread %d %s%s", waiting->waits_at, other->number,
                            other->now == FREE ? "" : "is at ", whereabouts(other));
    else
        usli_emulated_fault("waits for ever at %s: a lane of its mask is not in the block, or came with another mask",
                            waiting->waits_at);
}

void run_block() {
    alive = threads;
    ready_count = at_barrier = barrier_sum = 0;
    latest_first = draw(2);
    for (int i = 0; i < (threads + WARP - 1) / WARP; i++) warps[i].count = 0;
    for (int i = 0; i < threads; i++) fibers[i].copies_count = fibers[i].group = 0, make_ready(i);
    for (int i = threads - 1; i > 0; i--) {
        int other = (int)draw((uint32_t)i + 1), keep = ready[i];
        ready[i] = ready[other], ready[other] = keep;
    }
    while (ready_count) {
        self = next();
        threadIdx = self->index;
        switch_stack(&scheduler, self->stack_pointer);
    }
    if (!alive) return;
    report_deadlock();
    for (int i = 0; i < threads; i++)
        if (fibers[i].now != FREE) fibers[i].now = FREE, make_fiber(&fibers[i]);
}

/* ---- Memory ------------------------------------------------------------------------------------------------------ */

/* Before a block its size is kept: 256 bytes, so that the block stays aligned. */
enum { HEAD = 256 };

size_t *size_of(void *block) {
    return (size_t *)((char *)block - HEAD);
}

/* Static shared memory: the program's own symbols say where it is, as the only variables inside C++ functions that may
 * be written. */
struct place {
    char *at;
    size_t bytes;
} * places;
int places_count;

void find_places(const char *file) {
    const Elf64_Ehdr *elf = (const Elf64_Ehdr *)file;
    const Elf64_Shdr *sections = (const Elf64_Shdr *)(file + elf->e_shoff);
    const Elf64_Shdr *table = nullptr;
    for (int i = 0; i < elf->e_shnum; i++)
        if (sections[i].sh_type == SHT_SYMTAB) table = &sections[i];
    if (!table) return; /* stripped: static shared memory keeps what the last block left */
    const Elf64_Sym *symbols = (const Elf64_Sym *)(file + table->sh_offset);
    const char *names = file + sections[table->sh_link].sh_offset;
    size_t count = table->sh_size / sizeof *symbols;
    const char *base = nullptr;
    for (size_t i = 0; i < count; i++)
        if (!strcmp(names + symbols[i].st_name, "threadIdx")) base = (const char *)&threadIdx - symbols[i].st_value;
    places = (place *)malloc(sizeof *places * count);
    for (size_t i = 0; base && places && i < count; i++) {
        const Elf64_Sym *s = &symbols[i];
        if (ELF64_ST_TYPE(s->st_info) == STT_OBJECT && !strncmp(names + s->st_name, "_ZZ", 3) &&
            s->st_shndx < elf->e_shnum && sections[s->st_shndx].sh_flags & SHF_WRITE)
            places[places_count++] = { (char *)base + s->st_value, s->st_size };
    }
}

void read_symbols() {
    struct stat st;
    int fd = open("/proc/self/exe", O_RDONLY);
    if (fd < 0 || fstat(fd, &st)) return;
    void *file = mmap(nullptr, (size_t)st.st_size, PROT_READ, MAP_PRIVATE, fd, 0);
    close(fd);
    if (file == MAP_FAILED) return;
    find_places((const char *)file);
    munmap(file, (size_t)st.st_size);
}

void set_shared(size_t bytes) {
    if (!shared_end) {
        shared_block =
            (char *)mmap(nullptr, SHARED_MOST + 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (shared_block == MAP_FAILED) abort();
        shared_end = shared_block + SHARED_MOST;
        mprotect(shared_end, 4096, PROT_NONE);
        read_symbols();
    }
    shared_now = shared_end - (bytes + 15) / 16 * 16;
}

struct {
    const void *kernel;
    size_t bytes;
} allowed[256];
int allowed_count;

size_t allowed_shared(const void *kernel) {
    for (int i = 0; i < allowed_count; i++)
        if (allowed[i].kernel == kernel) return allowed[i].bytes;
    return 48 << 10;
}

size_t shared_most() {
    int sm = usli_emulated_sm();
    return (sm == 75 ? 64 : sm == 80 ? 163 : sm == 86 || sm == 89 || sm == 120 ? 99 : 227) << 10;
}

/* A block's shared memory holds nothing yet: NaNs. */
void spoil_shared() {
    memset(shared_now, 0xff, (size_t)(shared_end - shared_now));
    for (int i = 0; i < places_count; i++) memset(places[i].at, 0xff, places[i].bytes);
}

/* What the driver would refuse. */
cudaError_t check_launch(dim3 grid, dim3 block, size_t shared, const void *kernel) {
    uint64_t count = (uint64_t)block.x * block.y * block.z;
    if (!count || count > THREADS_MOST || block.z > 64 || !grid.x || !grid.y || !grid.z || grid.x > INT32_MAX ||
        grid.y > 65535 || grid.z > 65535)
        return cudaErrorInvalidConfiguration;
    return shared > allowed_shared(kernel) ? cudaErrorInvalidValue : cudaSuccess;
}

} // namespace

static int sm_of_launch; /* 0: none runs */

int usli_emulated_sm() {
    if (sm_of_launch) return sm_of_launch;
    const char *text = getenv("USLI_EMULATED_SM");
    return text ? atoi(text) : 80;
}

int usli_emulated_lane() {
    return self->number % WARP;
}

void *usli_emulated_shared() {
    return shared_now;
}

void usli_emulated_fault(const char *format, ...) {
    if (faulty) return; /* the first says most */
    faulty = true;
    char what[256];
    va_list args;
    va_start(args, format);
    vsnprintf(what, sizeof what, format, args);
    va_end(args);
    snprintf(fault_text, sizeof fault_text, "kernel %s, block (%u, %u, %u), thread (%u, %u, %u): %s", kernel_name,
             blockIdx.x, blockIdx.y, blockIdx.z, threadIdx.x, threadIdx.y, threadIdx.z, what);
    fprintf(stderr, "emulated GPU: %s\n", fault_text);
}

static void run_kernel(dim3 grid, dim3 block, size_t shared, const char *name, const void *kernel,
                       void (*thread)(void *), void *call) {
    pthread_mutex_lock(&lock);
    cudaError_t error = check_launch(grid, block, shared, kernel);
    kernel_name = name;
    if (error != cudaSuccess) {
        last_error = error;
        fprintf(stderr, "emulated GPU: kernel %s: grid (%u, %u, %u), block (%u, %u, %u), %zu bytes of shared memory\n",
                name, grid.x, grid.y, grid.z, block.x, block.y, block.z, shared);
    } else {
        set_shared(shared);
        threads = (int)(block.x * block.y * block.z);
        thread_run = thread, thread_call = call;
        gridDim = grid, blockDim = block;
        faulty = false;
        sm_of_launch = usli_emulated_sm();
        seed = 0x9e3779b97f4a7c15u;
        for (int i = 0; i < threads; i++) {
            fibers[i].number = i;
            fibers[i].index = { (unsigned)i % block.x, (unsigned)i / block.x % block.y,
                                (unsigned)i / block.x / block.y };
            if (!fibers[i].stack) make_fiber(&fibers[i]);
        }
        for (unsigned z = 0; z < grid.z && !faulty; z++)
            for (unsigned y = 0; y < grid.y && !faulty; y++)
                for (unsigned x = 0; x < grid.x && !faulty; x++) {
                    blockIdx = { x, y, z };
                    spoil_shared();
                    run_block();
                }
        sm_of_launch = 0;
        if (faulty) last_error = cudaErrorLaunchFailure;
    }
    pthread_mutex_unlock(&lock);
}

/* ---- Waiting ----------------------------------------------------------------------------------------------------- */

int usli_emulated_barrier(int value) {
    barrier_sum += value != 0;
    if (++at_barrier < threads) {
        self->now = AT_BARRIER;
        self->waits_at = "__syncthreads";
        leave();
        return self->value;
    }
    int sum = barrier_sum;
    at_barrier = barrier_sum = 0;
    for (int i = 0; i < threads; i++) {
        fibers[i].value = sum;
        if (&fibers[i] != self) make_ready(i);
    }
    return sum;
}

void usli_emulated_yield() {
    make_ready(self->number);
    leave();
}

void usli_emulated_meet(unsigned mask, const char *name, usli_emulated_collective run, void *lane) {
    int own = usli_emulated_lane(), first = self->number - own;
    warp *w = &warps[self->number / WARP];
    if (!(mask >> own & 1)) usli_emulated_fault("comes to %s with mask %08x, which it is not in", name, mask);
    meeting *m = nullptr;
    for (int i = 0; i < w->count && !m; i++)
        if (w->meetings[i].mask == mask && w->meetings[i].run == run) m = &w->meetings[i];
    if (!m) {
        m = &w->meetings[w->count++];
        *m = {};
        m->mask = mask, m->run = run;
    }
    m->lanes[own] = lane;
    m->here |= 1u << own;
    if ((m->here & mask) != mask) {
        self->now = AT_COLLECTIVE;
        self->waits_at = name;
        leave();
        return;
    }
    run(mask, m->lanes);
    for (int i = 0; i < WARP; i++)
        if (m->here >> i & 1 && i != own) make_ready(first + i);
    *m = w->meetings[--w->count];
}

/* ---- Copies under way -------------------------------------------------------------------------------------------- */

bool usli_emulated_aligned(const void *p, const char *what) {
    if ((uintptr_t)p % 16 == 0) return true;
    usli_emulated_fault("%s: the address %p is not a multiple of 16", what, p);
    return false;
}

static void copy_later(void *to, const void *from, int bytes, bool valid) {
    fiber *f = self;
    if (f->copies_count == f->copies_room) {
        f->copies_room = f->copies_room ? 2 * f->copies_room : 64;
        f->copies = (copy *)realloc(f->copies, sizeof(copy) * (size_t)f->copies_room);
        if (!f->copies) abort();
    }
    f->copies[f->copies_count++] = { to, from, bytes, valid, f->group };
    memset(to, 0xff, (size_t)bytes);
}

void cp_async16(void *shared, const void *global, bool valid) {
    if (!usli_emulated_aligned(shared, "cp_async16, shared") ||
        (valid && !usli_emulated_aligned(global, "cp_async16, global")))
        return;
    copy_later(shared, global, 16, valid);
}

void cp_async4(void *shared, const void *global) {
    if ((uintptr_t)shared % 4 || (uintptr_t)global % 4)
        return usli_emulated_fault("cp_async4: an address is not a multiple of 4");
    copy_later(shared, global, 4, true);
}

void cp_async_commit() {
    self->group++;
}

void usli_emulated_cp_wait(int newest) {
    fiber *f = self;
    int left = 0;
    for (int i = 0; i < f->copies_count; i++) {
        copy c = f->copies[i];
        if (c.group >= f->group - newest)
            f->copies[left++] = c;
        else if (c.valid)
            memcpy(c.to, c.from, (size_t)c.bytes);
        else
            memset(c.to, 0, (size_t)c.bytes);
    }
    f->copies_count = left;
}

/* ---- The runtime ------------------------------------------------------------------------------------------------- */

/* What a graph repeats: a launch, a memset (no call, no source) or a copy. */
struct node {
    dim3 grid, block;
    size_t shared;
    const char *name;
    const void *kernel;
    void (*thread)(void *);
    void *call, *dst;
    const void *src;
    int value;
    size_t bytes;
    node *next;
};
/* One object is the graph and what is made ready of it. */
struct usli_emulated_graph {
    node *first, **end;
    size_t count, taken; /* taken: bytes of the device */
    int holders;
};
struct usli_emulated_stream {
    usli_emulated_graph *capture; /* NULL: things run */
    bool spoilt;
};
struct usli_emulated_event {
    timespec time;
};
static thread_local cudaStream_t capturing; /* of this thread */

static void keep(cudaStream_t stream, const node &n, const void *call, size_t call_bytes) {
    node *own = (node *)malloc(sizeof *own);
    if (!own) abort();
    *own = n;
    own->next = nullptr;
    if (call) {
        own->call = aligned_alloc(64, (call_bytes + 63) / 64 * 64);
        if (!own->call) abort();
        memcpy(own->call, call, call_bytes);
    }
    usli_emulated_graph *g = stream->capture;
    *g->end = own;
    g->end = &own->next;
    g->count++;
}

/* What a thread may not do while one of its streams captures. */
static bool spoils() {
    if (!capturing) return false;
    capturing->spoilt = true;
    last_error = cudaErrorStreamCaptureUnsupported;
    return true;
}

void usli_emulated_launch(cudaStream_t stream, dim3 grid, dim3 block, size_t shared, const char *name,
                          const void *kernel, void (*thread)(void *), void *call, size_t bytes) {
    if (!stream || !stream->capture) return run_kernel(grid, block, shared, name, kernel, thread, call);
    node n = {};
    n.grid = grid, n.block = block, n.shared = shared, n.name = name, n.kernel = kernel, n.thread = thread;
    keep(stream, n, call, bytes);
}

long long clock64() {
    return ticks += 100;
}

cudaError_t cudaGetDeviceCount(int *count) {
    *count = 1;
    return cudaSuccess;
}
cudaError_t cudaSetDevice(int device) {
    return device == 0 ? cudaSuccess : cudaErrorInvalidDevice;
}
cudaError_t cudaGetDevice(int *device) {
    *device = 0;
    return cudaSuccess;
}
cudaError_t cudaGetDeviceProperties(cudaDeviceProp *prop, int device) {
    if (device) return cudaErrorInvalidDevice;
    int sm = usli_emulated_sm();
    *prop = {};
    snprintf(prop->name, sizeof prop->name, "emulated GPU");
    prop->major = sm / 10, prop->minor = sm % 10;
    prop->multiProcessorCount = 4;
    prop->warpSize = WARP;
    prop->maxThreadsPerBlock = THREADS_MOST;
    prop->maxThreadsPerMultiProcessor = sm == 75 ? 1024 : 2048;
    prop->l2CacheSize = 1 << 20;
    prop->totalGlobalMem = MEMORY;
    prop->sharedMemPerBlock = 48 << 10;
    prop->sharedMemPerBlockOptin = shared_most();
    prop->sharedMemPerMultiprocessor = shared_most() + 1024;
    return cudaSuccess;
}
cudaError_t cudaGetLastError() {
    cudaError_t error = last_error;
    if (error != cudaSuccess && error != cudaErrorLaunchFailure) fault_text[0] = 0;
    last_error = cudaSuccess;
    return error;
}
cudaError_t cudaPeekAtLastError() {
    return last_error;
}
const char *cudaGetErrorString(cudaError_t error) {
    switch (error) {
    case cudaSuccess: return "no error";
    case cudaErrorInvalidValue: return "invalid argument";
    case cudaErrorMemoryAllocation: return "out of memory";
    case cudaErrorInvalidConfiguration: return "invalid configuration argument";
    case cudaErrorInvalidDevice: return "invalid device ordinal";
    case cudaErrorLaunchFailure: return fault_text;
    case cudaErrorNotSupported: return "operation not supported";
    case cudaErrorStreamCaptureUnsupported: return "operation not permitted when stream is capturing";
    case cudaErrorStreamCaptureInvalidated: return "operation failed due to a previous error during capture";
    }
    return "unknown error";
}
cudaError_t cudaMemGetInfo(size_t *left, size_t *total) {
    *total = MEMORY, *left = MEMORY - memory_used;
    return cudaSuccess;
}
/* Everything runs at once and in the order of the calls, copies beside the work too: their earliest moment. With
 * USL_EMULATE_LATE_COPIES those run at their latest, when somebody waits for the event behind them, so that a wait that
 * is missing, or a source that is overwritten too early, shows. Such programs have one thread that calls. */
struct late_copy {
    void *dst;
    const void *src;
    size_t bytes;
    cudaStream_t stream;
    cudaEvent_t event;
    late_copy *next;
};
static late_copy *late;

/* All that stand before an event in its stream, the event's own first copy included; NULL: all. */
static void copy_late(cudaEvent_t event = nullptr) {
    late_copy *last = nullptr;
    for (late_copy *c = late; event && c; c = c->next)
        if (c->event == event) last = c;
    if (event && !last) return;
    cudaStream_t stream = last ? last->stream : nullptr;
    for (late_copy **at = &late; *at;) {
        late_copy *c = *at;
        if (last && c->stream != stream) {
            at = &c->next;
            continue;
        }
        memmove(c->dst, c->src, c->bytes);
        *at = c->next;
        bool done = c == last;
        free(c);
        if (done) return;
    }
}

/* As on a device, new memory holds anything: here, NaNs. */
cudaError_t cudaMalloc(void **out, size_t bytes) {
    *out = nullptr;
    if (spoils()) return cudaErrorStreamCaptureUnsupported;
    if (!bytes) return cudaSuccess;
    pthread_mutex_lock(&lock);
    char *block = bytes > MEMORY - memory_used ? nullptr : (char *)aligned_alloc(256, (bytes + 255) / 256 * 256 + HEAD);
    if (block) {
        *out = block + HEAD;
        *size_of(*out) = bytes;
        memory_used += bytes;
    } else {
        last_error = cudaErrorMemoryAllocation;
    }
    pthread_mutex_unlock(&lock);
    if (block) memset(*out, 0xff, bytes);
    return block ? cudaSuccess : cudaErrorMemoryAllocation;
}
cudaError_t cudaFree(void *p) {
    if (!p) return cudaSuccess;
    if (spoils()) return cudaErrorStreamCaptureUnsupported;
    copy_late();
    pthread_mutex_lock(&lock);
    memory_used -= *size_of(p);
    pthread_mutex_unlock(&lock);
    free((char *)p - HEAD);
    return cudaSuccess;
}
cudaError_t cudaHostAlloc(void **out, size_t bytes, unsigned) {
    *out = aligned_alloc(256, (bytes + 255) / 256 * 256);
    return *out || !bytes ? cudaSuccess : cudaErrorMemoryAllocation;
}
cudaError_t cudaFreeHost(void *p) {
    copy_late();
    free(p);
    return cudaSuccess;
}
cudaError_t cudaMemcpy(void *dst, const void *src, size_t bytes, cudaMemcpyKind) {
    if (spoils()) return cudaErrorStreamCaptureUnsupported;
    memmove(dst, src, bytes);
    return cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void *dst, const void *src, size_t bytes, cudaMemcpyKind kind, cudaStream_t stream) {
    if (stream && stream->capture && kind == cudaMemcpyDeviceToDevice) {
        node n = {};
        n.dst = dst, n.src = src, n.bytes = bytes;
        keep(stream, n, nullptr, 0);
        return cudaSuccess;
    }
    if (kind != cudaMemcpyDefault || !getenv("USL_EMULATE_LATE_COPIES")) return cudaMemcpy(dst, src, bytes, kind);
    late_copy *c = (late_copy *)malloc(sizeof *c), **end = &late;
    if (!c) return cudaErrorMemoryAllocation;
    *c = { dst, src, bytes, stream, nullptr, nullptr };
    while (*end) end = &(*end)->next;
    *end = c;
    return cudaSuccess;
}
cudaError_t cudaMemset(void *dst, int value, size_t bytes) {
    memset(dst, value, bytes);
    return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void *dst, int value, size_t bytes, cudaStream_t stream) {
    if (!stream || !stream->capture) return cudaMemset(dst, value, bytes);
    node n = {};
    n.dst = dst, n.value = value, n.bytes = bytes;
    keep(stream, n, nullptr, 0);
    return cudaSuccess;
}
cudaError_t cudaDeviceSynchronize() {
    if (spoils()) return cudaErrorStreamCaptureUnsupported;
    copy_late();
    return cudaSuccess;
}
cudaError_t cudaStreamCreate(cudaStream_t *out) {
    *out = (cudaStream_t)calloc(1, sizeof **out);
    return *out ? cudaSuccess : cudaErrorMemoryAllocation;
}
cudaError_t cudaStreamCreateWithFlags(cudaStream_t *out, unsigned) {
    return cudaStreamCreate(out);
}
cudaError_t cudaStreamDestroy(cudaStream_t stream) {
    copy_late();
    free(stream);
    return cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t) {
    return spoils() ? cudaErrorStreamCaptureUnsupported : cudaSuccess;
}
cudaError_t cudaStreamWaitEvent(cudaStream_t, cudaEvent_t event, unsigned) {
    if (spoils()) return cudaErrorStreamCaptureUnsupported;
    copy_late(event);
    return cudaSuccess;
}
cudaError_t cudaEventCreate(cudaEvent_t *out) {
    *out = (cudaEvent_t)calloc(1, sizeof **out);
    return *out ? cudaSuccess : cudaErrorMemoryAllocation;
}
cudaError_t cudaEventCreateWithFlags(cudaEvent_t *out, unsigned) {
    return cudaEventCreate(out);
}
cudaError_t cudaEventDestroy(cudaEvent_t event) {
    free(event);
    return cudaSuccess;
}
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
    if (spoils()) return cudaErrorStreamCaptureUnsupported;
    late_copy *last = nullptr;
    for (late_copy *c = late; c; c = c->next) {
        if (c->event == event) c->event = nullptr;
        if (c->stream == stream) last = c;
    }
    if (last) last->event = event;
    clock_gettime(CLOCK_MONOTONIC, &event->time);
    return cudaSuccess;
}
cudaError_t cudaEventSynchronize(cudaEvent_t) {
    return cudaSuccess;
}
cudaError_t cudaEventQuery(cudaEvent_t) {
    return cudaSuccess;
}
cudaError_t cudaEventElapsedTime(float *ms, cudaEvent_t from, cudaEvent_t to) {
    *ms = (float)(to->time.tv_sec - from->time.tv_sec) * 1e3f + (float)(to->time.tv_nsec - from->time.tv_nsec) * 1e-6f;
    return cudaSuccess;
}

static void let_go(usli_emulated_graph *g) {
    if (--g->holders) return;
    for (node *n = g->first, *next; n; n = next) {
        next = n->next;
        free(n->call);
        free(n);
    }
    pthread_mutex_lock(&lock);
    memory_used -= g->taken;
    pthread_mutex_unlock(&lock);
    free(g);
}

cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode mode) {
    if (!stream || capturing || mode != cudaStreamCaptureModeThreadLocal) return cudaErrorNotSupported;
    usli_emulated_graph *g = (usli_emulated_graph *)calloc(1, sizeof *g);
    if (!g) return cudaErrorMemoryAllocation;
    g->end = &g->first;
    g->holders = 1;
    stream->capture = g;
    stream->spoilt = false;
    capturing = stream;
    return cudaSuccess;
}
cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t *out) {
    *out = nullptr;
    if (!stream || !stream->capture) return cudaErrorInvalidValue;
    usli_emulated_graph *g = stream->capture;
    stream->capture = nullptr;
    capturing = nullptr;
    if (!stream->spoilt) {
        *out = g;
        return cudaSuccess;
    }
    let_go(g);
    return cudaErrorStreamCaptureInvalidated;
}
cudaError_t cudaGraphInstantiate(cudaGraphExec_t *out, cudaGraph_t graph, unsigned long long) {
    graph->holders++;
    graph->taken = graph->count * USLI_EMULATED_NODE;
    pthread_mutex_lock(&lock);
    memory_used += graph->taken;
    pthread_mutex_unlock(&lock);
    *out = graph;
    return cudaSuccess;
}
cudaError_t cudaGraphLaunch(cudaGraphExec_t graph, cudaStream_t) {
    if (spoils()) return cudaErrorStreamCaptureUnsupported;
    for (const node *n = graph->first; n; n = n->next) {
        if (n->call)
            run_kernel(n->grid, n->block, n->shared, n->name, n->kernel, n->thread, n->call);
        else if (n->src)
            memmove(n->dst, n->src, n->bytes);
        else
            memset(n->dst, n->value, n->bytes);
    }
    cudaError_t error = last_error; /* a device tells it later; here nobody would ask */
    last_error = cudaSuccess;
    return error;
}
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t graph) {
    let_go(graph);
    return cudaSuccess;
}
cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
    let_go(graph);
    return cudaSuccess;
}

cudaError_t usli_emulated_set_attribute(const void *kernel, cudaFuncAttribute attribute, int value) {
    if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
    if (value < 0 || (size_t)value > shared_most()) {
        last_error = cudaErrorInvalidValue;
        return cudaErrorInvalidValue;
    }
    pthread_mutex_lock(&lock);
    int at = 0;
    while (at < allowed_count && allowed[at].kernel != kernel) at++;
    if (at == (int)(sizeof allowed / sizeof *allowed)) abort();
    allowed[at] = { kernel, (size_t)value };
    if (at == allowed_count) allowed_count++;
    pthread_mutex_unlock(&lock);
    return cudaSuccess;
}

/* AMX's bfloat16 instructions for a CPU that lacks them: run when they are trapped.
 *
 * Loaded with LD_PRELOAD. Such a CPU raises SIGILL at an instruction of AMX; the
 * handler decodes it, does it on tiles in this thread's memory and goes on behind it.
 * Whatever the instruction set's reference says is an error ends the process, so that
 * a test fails: tiles that are not configured, sizes that don't fit each other, the
 * same tile twice. Linux, asked for the tiles' memory, seems to grant it.
 *
 * "Intel 64 and IA-32 Architectures Software Developer's Manual", volume 2: LDTILECFG,
 * STTILECFG, TILELOADD, TILESTORED, TILEZERO, TILERELEASE, TDPBF16PS.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

enum { TILES = 8, ROWS = 16, ROW_BYTES = 64 };

struct config { /* as LDTILECFG reads it */
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
};
_Static_assert(sizeof(struct config) == 64, "64 bytes");

static __thread struct config configured; /* palette 0: no tiles */
static __thread uint8_t tiles[TILES][ROWS][ROW_BYTES];

/* How often tiles were multiplied, for tests: what they test must have run. */
long amx_products;

static void fail(const char *why, const uint8_t *at) {
    char text[256];
    int n = snprintf(text, sizeof text, "AMX: %s, at %p: ", why, (const void *)at);
    for (int i = 0; i < 10; i++)
        n += snprintf(text + n, sizeof text - n, "%02x ", at[i]);
    text[n++] = '\n';
    if (write(2, text, n) < 0) { /* nothing more can be said */ }
    signal(SIGABRT, SIG_DFL);
    abort();
}

static void check_tile(int tile, const uint8_t *at) {
    if (!configured.palette) fail("tiles are not configured", at);
    if (tile >= TILES || !configured.rows[tile] || !configured.row_bytes[tile])
        fail("this tile is not configured", at);
}

static void configure(const struct config *new, const uint8_t *at) {
    memset(tiles, 0, sizeof tiles);
    if (!new->palette) {
        memset(&configured, 0, sizeof configured);
        return;
    }
    if (new->palette != 1 || new->start_row) fail("no such palette", at);
    for (int i = 0; i < 14; i++)
        if (new->reserved[i]) fail("reserved bytes are not zero", at);
    for (int i = 0; i < 16; i++) {
        int rows = new->rows[i], bytes = new->row_bytes[i];
        if (i >= TILES ? rows || bytes : rows > ROWS || bytes > ROW_BYTES)
            fail("no such tile", at);
        if (!rows != !bytes) fail("a tile of no size", at);
    }
    configured = *new;
}

/* For tests: this thread's configuration, 64 bytes, and another one. */
void amx_configuration(void *to) { memcpy(to, &configured, sizeof configured); }
void amx_configure(const void *from) { configure(from, from); }

static float number(uint16_t bits) {
    uint32_t wide = (uint32_t)bits << 16;
    float x;
    if (!(wide & 0x7f800000)) wide &= 0x80000000; /* denormals are zero */
    memcpy(&x, &wide, 4);
    return x;
}

static float flushed(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    if (!(bits & 0x7f800000)) bits &= 0x80000000;
    memcpy(&x, &bits, 4);
    return x;
}

static void multiply(int c, int a, int b, const uint8_t *at) {
    check_tile(a, at), check_tile(b, at), check_tile(c, at);
    if (a == b || b == c || c == a) fail("a tile is named twice", at);
    const struct config *k = &configured;
    if (k->rows[c] != k->rows[a] || k->row_bytes[a] != 4 * k->rows[b] ||
        k->row_bytes[b] != k->row_bytes[c] || k->row_bytes[c] % 4)
        fail("sizes don't fit", at);
    amx_products++;
    int columns = k->row_bytes[c] / 4;
    for (int m = 0; m < k->rows[c]; m++) {
        float even[16] = {0}, odd[16] = {0};
        uint16_t x[32], y[32];
        float sum[16];
        memcpy(x, tiles[a][m], ROW_BYTES);
        for (int j = 0; j < k->rows[b]; j++) {
            memcpy(y, tiles[b][j], ROW_BYTES);
            float first = number(x[2 * j]), second = number(x[2 * j + 1]);
            for (int n = 0; n < columns; n++) {
                even[n] = __builtin_fmaf(first, number(y[2 * n]), even[n]);
                odd[n] = __builtin_fmaf(second, number(y[2 * n + 1]), odd[n]);
            }
        }
        memcpy(sum, tiles[c][m], ROW_BYTES);
        for (int n = 0; n < columns; n++)
            sum[n] = flushed(flushed(sum[n]) + flushed(even[n] + odd[n]));
        memcpy(tiles[c][m], sum, ROW_BYTES);
    }
}

/* An address: base + (index << scale) + displacement; index is a tile's stride. */
struct place {
    uint8_t *base;
    int64_t index;
    const uint8_t *end; /* of the instruction */
};

static int64_t general(const ucontext_t *context, int number) {
    static const int of[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP,
                               REG_RSI, REG_RDI, REG_R8,  REG_R9,  REG_R10, REG_R11,
                               REG_R12, REG_R13, REG_R14, REG_R15};
    return context->uc_mcontext.gregs[of[number]];
}

static struct place address(const ucontext_t *context, const uint8_t *modrm, int x,
                            int b) {
    int mode = modrm[0] >> 6, low = modrm[0] & 7;
    const uint8_t *next = modrm + 1;
    struct place place = {0, 0, 0};
    int64_t base = 0;
    int displaced = mode == 2;
    if (low == 4) {
        int sib = *next++;
        int index = (sib >> 3 & 7) | x << 3, from = sib & 7;
        if (index != 4) place.index = general(context, index) << (sib >> 6);
        if (from == 5 && mode == 0)
            displaced = 1;
        else
            base = general(context, from | b << 3);
    } else if (low == 5 && mode == 0) {
        int32_t offset;
        memcpy(&offset, next, 4);
        next += 4;
        base = (int64_t)next + offset;
    } else {
        base = general(context, low | b << 3);
    }
    if (displaced) {
        int32_t offset;
        memcpy(&offset, next, 4);
        next += 4;
        base += offset;
    } else if (mode == 1) {
        base += (int8_t)*next++;
    }
    place.base = (uint8_t *)base;
    place.end = next;
    return place;
}

static void trapped(int signal_number, siginfo_t *info, void *untyped) {
    (void)signal_number, (void)info;
    ucontext_t *context = untyped;
    const uint8_t *at = (const uint8_t *)context->uc_mcontext.gregs[REG_RIP];
    /* Three bytes of VEX: map 0F38, W0, 128 bits. */
    if (at[0] != 0xc4 || (at[1] & 0x1f) != 2 || at[2] & 0x84)
        fail("an illegal instruction that isn't AMX's", at);
    int r = !(at[1] & 0x80), x = !(at[1] & 0x40), b = !(at[1] & 0x20);
    int other = ~at[2] >> 3 & 15, prefix = at[2] & 3, operation = at[3];
    const uint8_t *modrm = at + 4, *end = modrm + 1;
    int in_memory = modrm[0] >> 6 != 3;
    int tile = (modrm[0] >> 3 & 7) | r << 3;
    enum { NONE, P66, PF3, PF2 };
    if (operation == 0x49 && in_memory && tile == 0 && prefix <= P66) {
        struct place place = address(context, modrm, x, b);
        if (prefix == NONE)
            configure((const struct config *)place.base, at);
        else
            memcpy(place.base, &configured, sizeof configured);
        end = place.end;
    } else if (operation == 0x49 && prefix == NONE && modrm[0] == 0xc0) {
        static const struct config none;
        configure(&none, at);
    } else if (operation == 0x49 && prefix == PF2 && (modrm[0] & 0xc7) == 0xc0) {
        check_tile(tile, at);
        memset(tiles[tile], 0, sizeof tiles[tile]);
    } else if (operation == 0x4b && in_memory && (modrm[0] & 7) == 4 && prefix) {
        struct place place = address(context, modrm, x, b);
        check_tile(tile, at);
        int rows = configured.rows[tile], bytes = configured.row_bytes[tile];
        if (prefix != PF3) memset(tiles[tile], 0, sizeof tiles[tile]);
        for (int i = 0; i < rows; i++) {
            uint8_t *row = place.base + i * place.index;
            if (prefix == PF3)
                memcpy(row, tiles[tile][i], bytes);
            else
                memcpy(tiles[tile][i], row, bytes);
        }
        end = place.end;
    } else if (operation == 0x5c && prefix == PF3 && !in_memory) {
        multiply(tile, (modrm[0] & 7) | b << 3, other, at);
    } else {
        fail("an instruction that isn't known here", at);
    }
    context->uc_mcontext.gregs[REG_RIP] = (greg_t)end;
}

__attribute__((constructor)) static void begin(void) {
    struct sigaction action = {.sa_flags = SA_SIGINFO | SA_NODEFER};
    action.sa_sigaction = trapped;
    sigaction(SIGILL, &action, NULL);
}

/* Linux's, but for arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA). */
long syscall(long number, ...) {
    static long (*next)(long, ...);
    long x[6];
    va_list rest;
    va_start(rest, number);
    for (int i = 0; i < 6; i++) x[i] = va_arg(rest, long);
    va_end(rest);
    if (number == SYS_arch_prctl && x[0] == 0x1023 && x[1] == 18) return 0;
    if (!next) next = (long (*)(long, ...))dlsym(RTLD_NEXT, "syscall");
    return next(number, x[0], x[1], x[2], x[3], x[4], x[5]);
}

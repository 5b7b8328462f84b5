// What cards of compute capability 9.0 (sm_90a) have beside the others: products of a warpgroup (PTX ISA, wgmma), whose operands the matrix
// units read from shared memory by themselves while the threads go on. On the host `emulation/hopper.h` has the same functions.
//
// What holds between threads and matrix units:
//   - Results, and operands in registers, belong to the matrix units from a product until `wait_products`; what threads wrote into such
//     registers before is told by `begin_products`.
//   - Shared memory that threads wrote (also by `copy_16`, when `wait_copies` is over) is read by matrix units only after each writing
//     thread's `publish_shared` and a barrier.

#ifndef TIDEMILL_HOST

// A number that is the same in all lanes of a warp, told so that the compiler knows it: products must not be in branches that could part.
DEVICE u32 uniform(u32 value) { return __shfl_sync(0xffffffffu, value, 0); }

// Where something in shared memory is, as the instructions count.
DEVICE u32 shared_address(const void* at) { return (u32)__cvta_generic_to_shared(at); }

DEVICE void store_16(u32 to, const Quad& q) {
    asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(q.x[0]), "r"(q.x[1]), "r"(q.x[2]), "r"(q.x[3]) : "memory");
}

// Begins to copy 16 bytes of global memory to shared memory, or puts zeros there; `from` is an address also where it is not read.
DEVICE void copy_16(u32 to, const void* from, bool wanted) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(wanted ? 16u : 0u) : "memory");
}

// Ends a group of copies.
DEVICE void end_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most the last PENDING of this thread's groups are under way.
template <u32 PENDING>
DEVICE void wait_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

DEVICE void publish_shared() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

DEVICE void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DEVICE void end_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Registers of products are neither read nor written across this: the compiler does not know who else has them.
template <u32 N>
DEVICE void hold(float (&c)[N]) {
#pragma unroll
    for (u32 i = 0; i < N; i++) asm volatile("" : "+f"(c[i])::"memory");
}

template <u32 N>
DEVICE void hold(u32 (&a)[N][4]) {
#pragma unroll
    for (u32 i = 0; i < N; i++) asm volatile("" : "+r"(a[i][0]), "+r"(a[i][1]), "+r"(a[i][2]), "+r"(a[i][3])::"memory");
}

// Waits until no group of products is under way.
DEVICE void wait_products() { asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory"); }

#define EIGHT(c, i) \
    "+f"(c[i]), "+f"(c[i + 1]), "+f"(c[i + 2]), "+f"(c[i + 3]), "+f"(c[i + 4]), "+f"(c[i + 5]), "+f"(c[i + 6]), "+f"(c[i + 7])
#define THIRTY_TWO(c, i) EIGHT(c, i), EIGHT(c, i + 8), EIGHT(c, i + 16), EIGHT(c, i + 24)

// c = a b, or c += a b: a [64, 16] and b [16, 128] in bf16, both in shared memory, elements of k beside each other; the four warps
// have 16 rows of c each. With g = lane / 4 and t = lane % 4, c[4 i] and c[4 i + 1] are row g, columns 8 i + 2 t and the next; c[4 i + 2] and
// c[4 i + 3] row g + 8.
DEVICE void multiply_shared(float (&c)[64], u64 a, u64 b, bool add) {
    asm volatile(
        "{\n.reg .pred sums;\nsetp.ne.u32 sums, %66, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
        "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
        "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
        "%64, %65, sums, 1, 1, 0, 0;\n}"
        : THIRTY_TWO(c, 0), THIRTY_TWO(c, 32)
        : "l"(a), "l"(b), "r"((u32)add)
        : "memory");
}

// c += a b: a [64, 16] in registers, as `multiply` has it for the 16 rows of each warp; b [16, N] in shared memory, elements of n
// beside each other.
DEVICE void multiply_held(float (&c)[64], const u32 (&a)[4], u64 b) {
    asm volatile(
        "{\n.reg .pred sums;\nsetp.ne.u32 sums, 1, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
        "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
        "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
        "{%64, %65, %66, %67}, %68, sums, 1, 1, 1;\n}"
        : THIRTY_TWO(c, 0), THIRTY_TWO(c, 32)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b)
        : "memory");
}

DEVICE void multiply_held(float (&c)[32], const u32 (&a)[4], u64 b) {
    asm volatile(
        "{\n.reg .pred sums;\nsetp.ne.u32 sums, 1, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
        "{%32, %33, %34, %35}, %36, sums, 1, 1, 1;\n}"
        : THIRTY_TWO(c, 0)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b)
        : "memory");
}

#endif

// A panel is rows of 128 bytes of which eight make a pattern: piece i of 16 bytes of row r lies at place i ^ r % 8 (128-byte swizzle),
// so that neither eight rows of a piece nor eight pieces of a row meet in a bank. It begins at a multiple of 1024.
DEVICE u32 in_panel(u32 row, u32 piece) { return row * 128 + (piece ^ row % 8) * 16; }

// How matrix units find an operand in panels (PTX ISA, matrix descriptor): its first byte; the bytes from a panel to the next one along
// the elements that lie beside each other, 16 where there is no next; the bytes from a pattern of eight rows to the next.
DEVICE u64 operand(u32 at, u32 next_panel, u32 next_pattern) {
    return (u64)(at & 0x3ffff) >> 4 | (u64)(next_panel >> 4) << 16 | (u64)(next_pattern >> 4) << 32 | (u64)1 << 62;
}

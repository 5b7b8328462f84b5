// What `cuda/hopper.cuh` has of a card, on a processor. Everything that a card does by itself is done as late as it may: copies and products
// when a thread waits for them. Until then the target of a copy and the results of a product hold NaN, and operands are read where they lie
// then; so what is waited for too late, or overwritten too early, gives wrong numbers. Operands in shared memory are found as the PTX ISA
// (matrix descriptor; strides; canonical layouts) tells matrix units to. A product that reads what was not published is the end.

namespace emulation {

// In the middle of a pattern of the swizzle, where shared memory may begin on a card, too.
constexpr u32 SHARED_BASE = 1024 + 128;

struct Copied {
    u32 to;
    const void* from;
    bool wanted;
};

struct Multiplied {
    // Of registers where there is no descriptor.
    u64 a;
    const u32* held;
    u64 b;
    float* c;
    u32 n;
    bool add;
};

// Results that are under way: what they are so far, and products to come.
struct Results {
    float* c;
    std::vector<float> values;
    u32 products;
};

struct Asynchronous {
    std::vector<Copied> copies;
    std::vector<std::vector<Copied>> copy_groups;
    // Pieces of shared memory that the thread wrote and did not publish.
    std::vector<u32> written;
    std::vector<Multiplied> products;
    u32 ended = 0;
    std::vector<Results> results;
    bool begun = false;
    u32 waits = 0;
};

struct AllAsynchronous {
    u64 block = 0;
    std::vector<Asynchronous> threads;
    // By warp: waits whose products were done.
    std::vector<u32> done;
    // By piece of 16 bytes: what matrix units may not read yet.
    std::vector<u8> unpublished;
};

inline AllAsynchronous& asynchronous() {
    static thread_local AllAsynchronous all;
    const Runner& r = runner();
    if (all.block != r.blocks) {
        all.block = r.blocks;
        all.threads.assign(r.threads, {});
        all.done.assign(r.threads / 32, 0);
        all.unpublished.assign(r.shared.size / 16 + 8, 0);
    }
    return all;
}

inline Asynchronous& mine() { return asynchronous().threads[runner().current]; }

inline u8* shared_at(u32 address, u32 bytes) {
    const Runner& r = runner();
    if (address < SHARED_BASE || address + bytes > SHARED_BASE + r.shared.size) fail("of Hopper", "an address outside of shared memory");
    if (address % bytes != 0) fail("of Hopper", "an address in shared memory that is no multiple of what is there");
    return r.shared.start() + (address - SHARED_BASE);
}

inline void write_shared(u32 to) {
    asynchronous().unpublished[(to - SHARED_BASE) / 16] = 1;
    mine().written.push_back((to - SHARED_BASE) / 16);
}

// Eight elements of an operand in bf16 that lie beside each other, along its inner dimension where `beside_k`: the `piece`th eight of the
// row that is `across`.
inline void operand_piece(u64 descriptor, bool beside_k, u32 across, u32 piece, float (&to)[8]) {
    const u32 start = (u32)(descriptor & 0x3fff) << 4, leading = (u32)(descriptor >> 16 & 0x3fff) << 4;
    const u32 stride = (u32)(descriptor >> 32 & 0x3fff) << 4, mode = (u32)(descriptor >> 62);
    if (descriptor >> 49 & 7) fail("of Hopper", "a matrix descriptor with a base offset, which is not emulated");
    // Pieces in a row of the pattern of which some change places: 128, 64 or 32 bytes, or a piece alone.
    const u32 pieces = mode == 0 ? 1 : 16 >> mode;
    u32 at = start + across % 8 * pieces * 16;
    if (mode == 0) {
        at += beside_k ? across / 8 * stride + piece * leading : across / 8 * leading + piece * stride;
    } else {
        at += across / 8 * stride + piece % pieces * 16 + piece / pieces * leading;
    }
    at ^= (at >> 7 & (pieces - 1)) << 4;
    const u8* const found = shared_at(at, 16);
    if (asynchronous().unpublished[(at - SHARED_BASE) / 16]) fail("of Hopper", "a product reads what was not published");
    for (u32 i = 0; i < 8; i++) {
        const u32 bits = (u32)(found[2 * i] | found[2 * i + 1] << 8) << 16;
        memcpy(&to[i], &bits, 4);
    }
}

// Does the products that the lanes of a warp wait for.
inline void multiply_warp(u32 warp) {
    Asynchronous* const lanes = &asynchronous().threads[warp * 32];
    const u32 count = lanes[0].ended;
    float a[16][16] = {}, b[16][256] = {}, c[16][256];
    for (u32 i = 0; i < count; i++) {
        const Multiplied first = lanes[0].products[i];
        for (u32 lane = 0; lane < 32; lane++) {
            const Multiplied& m = lanes[lane].products[i];
            const bool same = lanes[lane].ended == count && m.a == first.a && m.b == first.b && m.n == first.n && m.add == first.add;
            if (!same) fail("of Hopper", "the lanes of a warp do not multiply the same");
        }
        float eight[8];
        for (u32 row = 0; row < 16; row++) {
            for (u32 piece = 0; piece < 2; piece++) {
                if (!first.held) operand_piece(first.a, true, warp % 4 * 16 + row, piece, eight);
                for (u32 k = 0; k < 8; k++) {
                    const u32 word = first.held ? lanes[row % 8 * 4 + k / 2].products[i].held[row / 8 + piece * 2] : 0;
                    const u32 bits = (word >> k % 2 * 16 & 0xffff) << 16;
                    if (first.held) memcpy(&eight[k], &bits, 4);
                    a[row][piece * 8 + k] = eight[k];
                }
            }
        }
        // Beside registers, b lies with its elements of n beside each other.
        const u32 across = first.held ? 16 : first.n, pieces = first.held ? first.n / 8 : 2;
        for (u32 row = 0; row < across; row++) {
            for (u32 piece = 0; piece < pieces; piece++) {
                operand_piece(first.b, !first.held, row, piece, eight);
                for (u32 j = 0; j < 8; j++) (first.held ? b[row][piece * 8 + j] : b[piece * 8 + j][row]) = eight[j];
            }
        }
        memset(c, 0, sizeof(c));
        for (u32 row = 0; row < 16; row++)
            for (u32 k = 0; k < 16; k++)
                for (u32 column = 0; column < 256; column++) c[row][column] += a[row][k] * b[k][column];
        for (u32 lane = 0; lane < 32; lane++) {
            const Multiplied& m = lanes[lane].products[i];
            auto& all = lanes[lane].results;
            u32 which = 0;
            while (all[which].c != m.c) which++;
            for (u32 j = 0; j < first.n / 2; j++) {
                const u32 row = lane / 4 + j % 4 / 2 * 8, column = j / 4 * 8 + lane % 4 * 2 + j % 2;
                all[which].values[j] = (m.add ? all[which].values[j] : 0) + c[row][column];
            }
            if (--all[which].products == 0) {
                memcpy(m.c, all[which].values.data(), 4 * all[which].values.size());
                all.erase(all.begin() + which);
            }
        }
    }
    for (u32 lane = 0; lane < 32; lane++) {
        lanes[lane].products.erase(lanes[lane].products.begin(), lanes[lane].products.begin() + count);
        lanes[lane].ended = 0;
    }
}

inline void multiply(const Multiplied& m) {
    Asynchronous& own = mine();
    if (!own.begun) fail("of Hopper", "a product without begin_products after what was waited for");
    own.products.push_back(m);
    for (Results& r : own.results) {
        if (r.c != m.c) continue;
        r.products++;
        return;
    }
    own.results.push_back({m.c, std::vector<float>(m.c, m.c + m.n / 2), 1});
    memset(m.c, 0xff, m.n / 2 * 4);
}

}  // namespace emulation

DEVICE u32 uniform(u32 value) { return value; }
DEVICE u32 shared_address(const void* at) { return (u32)((const u8*)at - emulation::runner().shared.start()) + emulation::SHARED_BASE; }

DEVICE void store_16(u32 to, const Quad& q) {
    memcpy(emulation::shared_at(to, 16), &q, 16);
    emulation::write_shared(to);
}

DEVICE void copy_16(u32 to, const void* from, bool wanted) {
    memset(emulation::shared_at(to, 16), 0xff, 16);
    if (wanted && (u64)(uintptr_t)from % 16 != 0) emulation::fail("of Hopper", "a copy from no multiple of 16");
    emulation::asynchronous().unpublished[(to - emulation::SHARED_BASE) / 16] = 1;
    emulation::mine().copies.push_back({to, from, wanted});
}

DEVICE void end_copies() {
    emulation::Asynchronous& own = emulation::mine();
    own.copy_groups.push_back(std::move(own.copies));
    own.copies.clear();
}

template <u32 PENDING>
DEVICE void wait_copies() {
    auto& groups = emulation::mine().copy_groups;
    while (groups.size() > PENDING) {
        for (const emulation::Copied& copy : groups.front()) {
            u8* const to = emulation::shared_at(copy.to, 16);
            copy.wanted ? memcpy(to, copy.from, 16) : memset(to, 0, 16);
            emulation::write_shared(copy.to);
        }
        groups.erase(groups.begin());
    }
}

DEVICE void publish_shared() {
    auto& written = emulation::mine().written;
    for (u32 piece : written) emulation::asynchronous().unpublished[piece] = 0;
    written.clear();
}

DEVICE void begin_products() { emulation::mine().begun = true; }
DEVICE void end_products() { emulation::mine().ended = (u32)emulation::mine().products.size(); }

DEVICE void wait_products() {
    emulation::Asynchronous& own = emulation::mine();
    own.begun = false;
    own.waits++;
    // Not before all lanes have come so far; the first of them does the work of all.
    emulation::leave(emulation::AT_WARP_BARRIER);
    const u32 warp = emulation::runner().current / 32;
    u32& done = emulation::asynchronous().done[warp];
    if (done < emulation::mine().waits) {
        done = emulation::mine().waits;
        emulation::multiply_warp(warp);
    }
    emulation::leave(emulation::AT_WARP_BARRIER);
}

// The compiler sees that the results are written: their addresses are known elsewhere.
template <class T>
DEVICE void hold(T&) {}

DEVICE void multiply_shared(float (&c)[64], u64 a, u64 b, bool add) { emulation::multiply({a, nullptr, b, c, 128, add}); }

template <u32 N>
DEVICE void multiply_held(float (&c)[N], const u32 (&a)[4], u64 b) {
    emulation::multiply({0, a, b, c, 2 * N, true});
}

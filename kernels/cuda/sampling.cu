// From a row of logits to a token, in the order that `SampleRow` lays down: bias, penalties, mask, temperature, top-k, top-p, min-p,
// draw. A block for each row; the row is read from the second-level cache several times, by one processor and 8 numbers a thread at once:
// the more so the less there is beside it, so what is asked for alone is not read for (a likeliest token that nothing was done to).
//
// Everything that is summed is summed in whole numbers: weights exp(v - largest) times 2^40 in 64 bits. Such sums do not depend on
// the order of the additions, so a row's token is the same on every run and beside any company. Weights below 2^-41 count as
// nothing. The order of tokens is that of one 64-bit number: the value's bits made to sort like the value, then the smaller id.

constexpr u32 NONE = 0xffffffffu;
constexpr u32 THREADS = 512;
constexpr float LARGEST_FLOAT = 3.40282347e38f;
constexpr float ONE = 1099511627776.0f;  // 2^40

struct SampleRow {
    double uniform;
    // Token to score, or NONE.
    u32 score;
    u32 top_k;
    float temperature;
    float top_p;
    float min_p;
    float repetition;
    float presence;
    float frequency;
    u32 history_from;
    u32 history_to;
    u32 bias_from;
    u32 bias_to;
    // First word of the mask, or NONE.
    u32 mask;
    u32 mask_words;
    u32 top_n;
    u32 unused;
};

struct TokenCount {
    u32 token;
    u32 in_prompt;
    u32 generated;
};

struct TokenBias {
    u32 token;
    float value;
};

struct Sampled {
    u32 token;
    u32 rank;
    float logprob;
    float processed;
    u32 top;
    u32 processed_top;
};

struct Likely {
    u32 token;
    float logprob;
};

struct Sample {
    const float* logits;
    // [rows, vocabulary]: room for processed values.
    float* values;
    const SampleRow* rows;
    const TokenCount* history;
    const TokenBias* bias;
    const u32* masks;
    Sampled* sampled;
    // [rows, 2, most_top]: raw, then processed.
    Likely* top;
    u32 vocabulary;
    u32 width;
    u32 most_top;
    u32 unused;
};

// What threads of a block share.
struct Scratch {
    u64 numbers[THREADS / 32];
    // Sums of 64 bits, each in two halves.
    u32 low[256];
    u32 high[256];
    u64 found_above;
    u32 found_bin;
    u32 token;
};

// NaN counts as -infinity, +infinity as the largest float, and -0 as 0: tokens whose values are equal are in the order of their ids.
DEVICE float clean(float v) { return v != v ? -INFINITE : fminf(v, LARGEST_FLOAT) + 0.0f; }

// Sorts like the value; 0 is less than every value's.
DEVICE u32 sortable(float v) {
    const u32 bits = as_bits(v);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

DEVICE float unsortable(u32 key) { return as_float(key & 0x80000000u ? key & 0x7fffffffu : ~key); }

// A token's place in the order: greater is likelier.
DEVICE u64 place(float v, u32 token) { return (u64)sortable(v) << 32 | (0xffffffffu - token); }

DEVICE u64 weight(float v, float most) { return (u64)(expf(v - most) * ONE + 0.5f); }

// Log of a sum of weights, which is at least one whole weight.
DEVICE float log_of(u64 sum) { return (float)log((double)sum / (double)ONE); }

struct Row {
    const float* values;
    u32 count;
    float most;
};

// Calls `f(token, value)` for tokens `first`, `first + step` and so on, up to `end`. Several are read before the first is looked at.
template <class F>
DEVICE void each(const float* values, u32 first, u32 end, u32 step, const F& f) {
    constexpr u32 AT_ONCE = 8;
    for (; first < end; first += AT_ONCE * step) {
        float v[AT_ONCE];
#pragma unroll
        for (u32 i = 0; i < AT_ONCE; i++) v[i] = first + i * step < end ? values[first + i * step] : -INFINITE;
#pragma unroll
        for (u32 i = 0; i < AT_ONCE; i++) {
            if (first + i * step < end) f(first + i * step, v[i]);
        }
    }
}

// For all tokens of a row by the whole block: a token always by the same thread.
template <class F>
DEVICE void each(const Row& row, const F& f) {
    each(row.values, threadIdx.x, row.count, THREADS, f);
}

DEVICE u64 largest_below(const Row& row, u64 limit, Scratch& s) {
    u64 best = 0;
    each(row, [&](u32 token, float v) {
        const u64 here = place(v, token);
        if (here < limit && here > best) best = here;
    });
    return block_largest(best, s.numbers);
}

// Which tokens are kept: those before `last` in the order, itself included, and with enough weight.
struct Kept {
    u64 last;
    float min_p;
};

DEVICE bool keeps(const Row& row, const Kept& kept, u32 token, float v) {
    return v > -INFINITE && place(v, token) >= kept.last && (kept.min_p == 0 || v == row.most || expf(v - row.most) >= kept.min_p);
}

// Tokens of a warp, one after the other.
DEVICE u32 part_of_warp(const Row& row) { return (row.count + THREADS - 1) / THREADS * 32; }

// The weight of what is kept. That of each warp's part of the row stays in `s.numbers`.
DEVICE u64 weight_kept(const Row& row, const Kept& kept, Scratch& s) {
    const u32 warp = threadIdx.x / 32, from = warp * part_of_warp(row), to = smaller(from + part_of_warp(row), row.count);
    u64 sum = 0;
    each(row.values, from + threadIdx.x % 32, to, 32, [&](u32 token, float v) {
        if (keeps(row, kept, token, v)) sum += weight(v, row.most);
    });
    return block_sum(sum, s.numbers);
}

// Adds to a sum of 64 bits with atomic additions of 32. Each of them that goes beyond 32 bits knows it from what was there before.
DEVICE void add_to_bin(Scratch& s, u32 bin, u64 value) {
    const u32 low = (u32)value, before = add_atomically(&s.low[bin], low);
    const u32 high = (u32)(value >> 32) + (before + low < low);
    if (high != 0) add_atomically(&s.high[bin], high);
}

// The last token of the shortest prefix of the order (among `kept`) that has `count` tokens or `target` weight, whichever is asked
// for. Tokens are sorted into bins, then those of the bin in which the prefix ends, until one is left: first by how far they are from the
// largest, eighths of a nat, among which they lie well spread (many threads that add to one bin wait for each other), then by the
// highest bits in which their places differ, which knows ties, too.
DEVICE u64 prefix_end(const Row& row, const Kept& kept, bool by_weight, u64 target, Scratch& s) {
    u64 least = 0, most = ~0ull;
    u32 shift = NONE;
    for (;;) {
        const auto in_question = [&](u32 token, float v) {
            const u64 here = place(v, token);
            return here >= least && here <= most && keeps(row, kept, token, v);
        };
        const auto bin_of = [&](u32 token, float v) {
            if (shift != NONE) return (u32)(place(v, token) >> shift) & 255;
            return 255 - (u32)fminf((row.most - v) * 8.0f, 255.0f);
        };
        // All have been at a barrier since anybody read them.
        for (u32 i = threadIdx.x; i < 256; i += THREADS) s.low[i] = s.high[i] = 0;
        block_barrier();
        each(row, [&](u32 token, float v) {
            if (!in_question(token, v)) return;
            const u64 value = by_weight ? weight(v, row.most) : 1;
            if (value != 0) add_to_bin(s, bin_of(token, v), value);
        });
        block_barrier();
        if (threadIdx.x < 32) {
            // Lane 0 has the 8 highest bins.
            const u32 lane = threadIdx.x;
            u64 bins[8], mine = 0;
#pragma unroll
            for (u32 i = 0; i < 8; i++) {
                const u32 bin = 255 - lane * 8 - i;
                bins[i] = (u64)s.high[bin] << 32 | s.low[bin];
                mine += bins[i];
            }
            u64 until = mine;
            for (u32 step = 1; step < 32; step *= 2) {
                const u64 before = shuffle_up(until, step);
                if (lane >= step) until += before;
            }
            const u32 reached = ballot(until >= target);
            // Rounding may leave the target out of reach: then the last bin that has anything.
            const u32 filled = ballot(mine > 0);
            u32 owner = 0;
            if (reached != 0) {
                while (!(reached >> owner & 1)) owner++;
            } else {
                owner = 31;
                while (owner > 0 && !(filled >> owner & 1)) owner--;
            }
            if (lane == owner) {
                u64 above = until - mine, above_last = above;
                u32 last = 255 - lane * 8;
#pragma unroll
                for (u32 i = 0; i < 8; i++) {
                    if (bins[i] == 0 || above >= target) continue;
                    last = 255 - lane * 8 - i;
                    above_last = above;
                    above += bins[i];
                }
                s.found_bin = last;
                s.found_above = above_last;
            }
        }
        block_barrier();
        const u32 bin = s.found_bin;
        target -= s.found_above < target ? s.found_above : target;
        if (target == 0) target = 1;
        u64 highest = 0, lowest = 0;
        each(row, [&](u32 token, float v) {
            if (!in_question(token, v) || bin_of(token, v) != bin) return;
            const u64 here = place(v, token);
            if (here > highest) highest = here;
            if (~here > lowest) lowest = ~here;
        });
        most = block_largest(highest, s.numbers);
        least = ~block_largest(lowest, s.numbers);
        // None is in question where no weights are numbers.
        if (least >= most) return most;
        const u32 differing = 63 - leading_zeros(least ^ most);
        shift = differing > 7 ? differing - 7 : 0;
    }
}

// The first token in the order of ids at which the kept weight exceeds `target`; the last kept one if none does. `s.numbers` has the
// weights of the warps' parts of the row.
DEVICE u32 draw(const Row& row, const Kept& kept, u64 target, Scratch& s) {
    const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    u64 before = 0;
    u32 part = 0;
    while (part < THREADS / 32 && before + s.numbers[part] <= target) before += s.numbers[part++];
    const u32 from = part * part_of_warp(row), to = smaller(from + part_of_warp(row), row.count);
    if (threadIdx.x == 0) s.token = NONE;
    for (u32 first = from; first < to; first += THREADS) {
        const u32 i = first + threadIdx.x;
        const float v = i < to ? row.values[i] : -INFINITE;
        const u64 mine = keeps(row, kept, i, v) ? weight(v, row.most) : 0;
        u64 until = mine;
        for (u32 step = 1; step < 32; step *= 2) {
            const u64 lower = shuffle_up(until, step);
            if (lane >= step) until += lower;
        }
        block_barrier();
        if (lane == 31) s.numbers[warp] = until;
        block_barrier();
        u64 all = 0;
        for (u32 w = 0; w < THREADS / 32; w++) {
            if (w < warp) until += s.numbers[w];
            all += s.numbers[w];
        }
        until += before;
        if (mine > 0 && until > target && until - mine <= target) s.token = i;
        before += all;
        if (before > target) break;
    }
    block_barrier();
    u32 token = s.token;
    if (token == NONE) {
        u64 last = 0;
        each(row, [&](u32 i, float v) {
            if (keeps(row, kept, i, v)) last = i;
        });
        token = (u32)block_largest(last, s.numbers);
    }
    return token;
}

// The likeliest `n` of the kept, with log-probabilities. Returns how many there were.
DEVICE u32 list_top(const Row& row, const Kept& kept, float total, u32 n, Likely* to, Scratch& s) {
    u64 limit = ~0ull;
    for (u32 i = 0; i < n; i++) {
        const u64 here = largest_below(row, limit, s);
        const u32 token = 0xffffffffu - (u32)here;
        if (here == 0 || !keeps(row, kept, token, row.values[token])) return i;
        if (threadIdx.x == 0) to[i] = Likely{token, row.values[token] - row.most - total};
        limit = here;
    }
    return n;
}

DEVICE u32 smallest_allowed(const u32* words, u32 count, u32 vocabulary, Scratch& s) {
    // As a largest number, since that is what there is.
    u64 best = 0;
    for (u32 i = threadIdx.x; i < vocabulary; i += blockDim.x) {
        if (i / 32 < count && words[i / 32] >> i % 32 & 1) {
            const u64 here = 0xffffffffu - i;
            if (here > best) best = here;
        }
    }
    best = block_largest(best, s.numbers);
    return best == 0 ? 0 : 0xffffffffu - (u32)best;
}

KERNEL_ALONE(sample, 512, Sample) {
    SHARED(shared);
    Scratch& s = *(Scratch*)shared;
    const u32 at = blockIdx.x;
    const SampleRow wanted = p.rows[at];
    const float* const logits = p.logits + (u64)at * p.width;
    float* const values = p.values + (u64)at * p.vocabulary;
    Likely* const top = p.top + (u64)at * 2 * p.most_top;
    const Kept all = {0, 0};

    u64 most = 0;
    each({logits, p.vocabulary, 0}, [&](u32 i, float logit) {
        const float v = clean(logit);
        values[i] = v;
        const u64 here = place(v, i);
        if (here > most) most = here;
    });
    const u64 raw_best = block_largest(most, s.numbers);
    Row row = {values, p.vocabulary, unsortable((u32)(raw_best >> 32))};
    const float raw_most = row.most;
    const u64 raw_weight = raw_most == -INFINITE ? 0 : weight_kept(row, all, s);
    const float raw_total = raw_most == -INFINITE ? 0 : log_of(raw_weight);
    const u32 raw_top = list_top(row, all, raw_total, wanted.top_n, top, s);

    u32 token = wanted.score;
    float processed = 0;
    u32 processed_top = 0;
    if (wanted.score == NONE) {
        const bool greedy = wanted.temperature == 0;
        const bool changed =
            !greedy || wanted.mask != NONE || wanted.bias_from != wanted.bias_to || wanted.history_from != wanted.history_to;
        const u32* const mask = p.masks + wanted.mask;
        u64 best = raw_best;
        if (changed) {
            block_barrier();
            // A thread has the tokens whose number leaves its own as rest, here and below: one that is listed twice is dealt with in order.
            for (u32 i = wanted.bias_from; i < wanted.bias_to; i++) {
                const TokenBias bias = p.bias[i];
                if (bias.token < p.vocabulary && bias.token % THREADS == threadIdx.x) values[bias.token] += bias.value;
            }
            for (u32 i = wanted.history_from; i < wanted.history_to; i++) {
                const TokenCount seen = p.history[i];
                if (seen.token >= p.vocabulary || seen.token % THREADS != threadIdx.x) continue;
                float v = values[seen.token];
                if (seen.in_prompt || seen.generated > 0) v = v > 0 ? v / wanted.repetition : v * wanted.repetition;
                v -= wanted.frequency * (float)seen.generated;
                if (seen.generated > 0) v -= wanted.presence;
                values[seen.token] = v;
            }
            most = 0;
            each(row, [&](u32 i, float given) {
                float v = clean(given);
                if (wanted.mask != NONE && !(i / 32 < wanted.mask_words && mask[i / 32] >> i % 32 & 1)) v = -INFINITE;
                if (!greedy && v > -INFINITE) v = fmaxf(clean(v / wanted.temperature), -LARGEST_FLOAT);
                values[i] = v;
                const u64 here = place(v, i);
                if (here > most) most = here;
            });
            best = block_largest(most, s.numbers);
        }
        row.most = unsortable((u32)(best >> 32));
        if (row.most == -INFINITE) {
            token = wanted.mask == NONE ? 0 : smallest_allowed(mask, wanted.mask_words, p.vocabulary, s);
            processed = -INFINITE;
        } else {
            Kept kept = all;
            if (!greedy) {
                if (wanted.top_k > 0 && wanted.top_k < p.vocabulary) kept.last = prefix_end(row, kept, false, wanted.top_k, s);
                if (wanted.top_p < 1) {
                    const double share = (double)wanted.top_p * (double)weight_kept(row, kept, s);
                    u64 target = (u64)share;
                    if ((double)target < share) target++;
                    kept.last = prefix_end(row, kept, true, target > 0 ? target : 1, s);
                }
                kept.min_p = wanted.min_p;
            }
            const u64 total = changed ? weight_kept(row, kept, s) : raw_weight;
            token = greedy ? 0xffffffffu - (u32)best : draw(row, kept, (u64)(wanted.uniform * (double)total), s);
            processed = values[token] - row.most - log_of(total);
            processed_top = list_top(row, kept, log_of(total), wanted.top_n, top + p.most_top, s);
        }
    }

    const u64 mine = place(clean(logits[token]), token);
    u64 before = 0;
    if (mine != raw_best) {
        each({logits, p.vocabulary, 0}, [&](u32 i, float logit) { before += place(clean(logit), i) > mine; });
        before = block_sum(before, s.numbers);
    }
    if (threadIdx.x == 0) {
        const float own = clean(logits[token]), logprob = raw_most == -INFINITE ? own : own - raw_most - raw_total;
        p.sampled[at] = Sampled{token, (u32)before + 1, logprob, wanted.score == NONE ? processed : logprob, raw_top, processed_top};
    }
}

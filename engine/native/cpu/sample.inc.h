// Sampling, by the rules and with the noise of engine/sampler.py, and log-probabilities. Included once for each
// instruction set, inside its namespace, after ops.inc.h.
//
// A row is one chunk. What is chosen depends on the row's logits, its seed and its position alone. Weights and waiting
// times are within a few units in the last place of the reference's, so that the winner differs only at near ties.

// What a slot asks for that plain columns can't say; pointers are null where there is none.
typedef struct ds_slot {
    const int32_t *bias_ids;  // ids here are all below the vocabulary's size
    const float *bias;
    int64_t biases;
    const int32_t *stop_ids;
    int64_t stops;
    int32_t *output;        // [vocabulary]: times an id occurs in the output; counted on here
    const uint8_t *prompt;  // [vocabulary]: whether it occurs in the prompt
} ds_slot;

// Columns of length rows, but for those by slot. Handed over as `w` of an operator whose x is logits f32 [rows, n].
typedef struct ds_sampling {
    int64_t rows;
    const int32_t *slot;
    const int64_t *position;
    const uint64_t *seed;
    const float *temperature;
    const int32_t *top_k;
    const float *top_p, *min_p, *presence, *frequency, *repetition;
    const uint8_t *hold_stop, *has_setup;
    const int32_t *logprobs;  // -1: none, else how many of the likeliest
    const ds_slot *slots;     // by slot; read where has_setup
    int32_t *last;            // by slot: written
    int32_t *ids;             // written; `score` reads them
    int64_t top;              // width of the next but two: the largest of `logprobs`
    float *chosen;            // these four are written where logprobs >= 0
    int32_t *rank, *top_ids;  // top_ids [rows, top]
    float *top_values;        // [rows, top]
} ds_sampling;

#define DS_GREEDY_BELOW 1e-5f

// ---- logarithm and noise ---------------------------------------------------------------------------------------------

// ln x for positive, normal x (Cephes' logf).
DS_INLINE F log_of(F x) {
    I bits = (I)x;
    I e = ((bits >> 23) & 255) - 126;
    F m = (F)((bits & 0x007fffff) | 0x3f000000);  // in [0.5, 1)
    I low = m < 0.70710678f;                      // -1 where true
    e += low;
    F f = m - 1.0f + (low ? m : F{});
    F n = __builtin_convertvector(e, F), z = f * f;
    F p = splat(7.0376836292e-2f);
    p = fma(p, f, splat(-1.1514610310e-1f));
    p = fma(p, f, splat(1.1676998740e-1f));
    p = fma(p, f, splat(-1.2420140846e-1f));
    p = fma(p, f, splat(1.4249322787e-1f));
    p = fma(p, f, splat(-1.6668057665e-1f));
    p = fma(p, f, splat(2.0000714765e-1f));
    p = fma(p, f, splat(-2.4999993993e-1f));
    p = fma(p, f, splat(3.3333331174e-1f));
    F y = p * f * z;
    y = fma(n, splat(-2.12194440e-4f), y);
    y = fma(z, splat(-0.5f), y);
    return fma(n, splat(0.693359375f), f + y);
}

// -ln(1 - u) for u in (0, 1].
DS_INLINE F waiting_of(F u) {
    F y = 1.0f - u;
    F lost = (1.0f - y) - u;  // what rounding 1 - u lost; exact
    F safe = y > 0.0f ? y : splat(1.0f);
    return y > 0.0f ? -(log_of(safe) + lost / safe) : splat(__builtin_inff());
}

static inline uint64_t mix64(uint64_t z) {
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9ull;
    z = (z ^ z >> 27) * 0x94D049BB133111EBull;
    return z ^ z >> 31;
}

DS_INLINE U scramble(U x) {
    x = (x ^ x >> 16) * 0x85EBCA6Bu;
    x = (x ^ x >> 13) * 0xC2B2AE35u;
    return x ^ x >> 16;
}

DS_INLINE F uniform_of(U ids, uint64_t key) {
    U words = scramble(scramble(ids + (uint32_t)key) ^ (uint32_t)(key >> 32));
    return (__builtin_convertvector(words, F) + 0.5f) * 2.3283064365386963e-10f;
}

// ---- searching -------------------------------------------------------------------------------------------------------
// A float's bits, the lower ones inverted where it is negative, are an integer of the same order: thresholds are found by
// bisection over those.

DS_INLINE float from_order(int32_t key) {
    int32_t bits = key ^ (key >> 31 & 0x7fffffff);
    float x;
    __builtin_memcpy(&x, &bits, sizeof x);
    return x;
}
DS_INLINE int32_t to_order(float x) {
    int32_t bits;
    __builtin_memcpy(&bits, &x, sizeof bits);
    return bits ^ (bits >> 31 & 0x7fffffff);
}
enum { LOWEST = (int32_t)0x807fffff, HIGHEST = 0x7f800000 };  // of -inf, of inf

DS_INLINE int any_lane(I truth) {
    U bits = (U)truth;
    uint64_t all[WIDTH / 2], some = 0;
    __builtin_memcpy(all, &bits, sizeof all);
    for (int i = 0; i < WIDTH / 2; i++) some |= all[i];
    return some != 0;
}

// Vectors of x[n]; the last is filled up with -inf.
DS_INLINE F load_padded(const float *x, int64_t j, int64_t n) {
    if (j + WIDTH <= n) return load(x + j);
    float all[WIDTH];
    for (int i = 0; i < WIDTH; i++) all[i] = j + i < n ? x[j + i] : -__builtin_inff();
    return load(all);
}

static float largest(const float *x, int64_t n) {
    F top = splat(-__builtin_inff());
    for (int64_t j = 0; j < n; j += WIDTH) {
        F v = load_padded(x, j, n);
        top = top < v ? v : top;
    }
    return largest_lane(top);
}

// Where the first element stands that equals `value`; 0 if none does.
static int32_t first_of(const float *x, int64_t n, float value) {
    for (int64_t j = 0; j < n; j += WIDTH) {
        F v = load_padded(x, j, n);
        if (any_lane(v == value))
            for (int64_t i = j; i < n; i++)
                if (x[i] == value) return (int32_t)i;
    }
    return 0;
}

// Copies the elements that are at least `floor`, in order; returns how many.
static int64_t pick(float *to, const float *x, int64_t n, float floor) {
    int64_t many = 0;
    for (int64_t j = 0; j < n; j += WIDTH)
        if (any_lane(load_padded(x, j, n) >= floor))
            for (int64_t i = j; i < j + WIDTH && i < n; i++) {  // without a branch that nobody can predict
                to[many] = x[i];
                many += x[i] >= floor;
            }
    return many;
}

// The k-th largest of x[n], 0 < k <= n.
static float kth_by_bisection(const float *x, int64_t n, int64_t k) {
    int64_t low = LOWEST, high = (int64_t)HIGHEST + 1;  // at least k elements reach low, fewer reach high
    while (high - low > 1) {
        int64_t middle = (low + high) >> 1;
        float bound = from_order((int32_t)middle);
        int64_t many = 0;
        for (int64_t i = 0; i < n; i++) many += x[i] >= bound;
        if (many >= k) low = middle;
        else high = middle;
    }
    return from_order((int32_t)low);
}

enum { CHUNK = 64 };

// The same, of which `room` [2 n] is overwritten. The k-th largest of the largest of each CHUNK is no larger than what is
// sought, and few elements reach it.
static float kth_largest(const float *x, int64_t n, int64_t k, float *room) {
    int64_t chunks = (n + CHUNK - 1) / CHUNK;
    float bound = -__builtin_inff();
    if (k <= chunks) {
        for (int64_t c = 0; c < chunks; c++) {
            int64_t left = n - c * CHUNK;
            room[c] = largest(x + c * CHUNK, left < CHUNK ? left : (int64_t)CHUNK);
        }
        bound = kth_by_bisection(room, chunks, k);
    }
    int64_t many = pick(room, x, n, bound);
    return many < k ? bound : kth_by_bisection(room, many, k);
}

// ---- a row -----------------------------------------------------------------------------------------------------------

// Steps 1 to 5 of the rules, in place.
static void penalise(float *x, int64_t n, const ds_sampling *s, int64_t row) {
    const ds_slot *slot = s->slots + s->slot[row];
    if (s->hold_stop[row])
        for (int64_t i = 0; i < slot->stops; i++) x[slot->stop_ids[i]] = -__builtin_inff();
    for (int64_t i = 0; i < slot->biases; i++) x[slot->bias_ids[i]] += slot->bias[i];
    if (!slot->output) return;
    const float repetition = s->repetition[row], frequency = s->frequency[row], presence = s->presence[row];
    for (int64_t i = 0; i < n; i++) {
        int32_t times = slot->output[i];
        float v = x[i];
        if (repetition != 1.0f && (times > 0 || slot->prompt[i])) v = v > 0.0f ? v / repetition : v * repetition;
        x[i] = v - frequency * (float)times - presence * (float)(times > 0);
    }
}

// The smallest logit that top_p keeps of those that reach `floor`; `room` [n] is overwritten.
static float nucleus(const float *x, int64_t n, float peak, float floor, float top_p, float *room) {
    double whole = 0;
    for (int64_t j = 0; j < n; j += WIDTH) {
        F v = load_padded(x, j, n);
        I left = v >= floor;
        if (any_lane(left)) whole += sum_lanes(left ? exp_of(v - peak) : F{});
    }
    const double wanted = (double)top_p * whole;
    // Most often a few hundred of the likeliest hold the nucleus: look no further than it takes.
    int64_t many = 0;
    float *weights = room + n;
    for (float reach = 2.0f;; reach *= 2.0f) {
        float bound = peak - reach > floor && reach < 128.0f ? peak - reach : floor;
        many = pick(room, x, n, bound);
        for (int64_t j = 0; j < many; j += WIDTH) {
            F w = exp_of(load_padded(room, j, many) - peak);
            store_part(weights + j, w, many - j < WIDTH ? many - j : (int64_t)WIDTH);
        }
        double sum = 0;
        for (int64_t i = 0; i < many; i++) sum += weights[i];
        if (sum >= wanted || bound == floor) {
            floor = bound;
            break;
        }
    }
    // The smallest bound such that what lies above it sums to less than wanted. Elements about which the answer is known
    // are left behind.
    int64_t low = (int64_t)to_order(floor) - 1, high = to_order(peak);  // high is such a bound, low isn't known to be
    double beyond = 0;                                                  // the sum of what lies above high
    while (high - low > 1) {
        int64_t middle = (low + high) >> 1, left = 0;
        float bound = from_order((int32_t)middle);
        double above = beyond;
        for (int64_t i = 0; i < many; i++) above += room[i] > bound ? (double)weights[i] : 0.0;
        const bool small = above < wanted;
        if (small) high = middle, beyond = above;
        else low = middle;
        for (int64_t i = 0; i < many; i++) {
            room[left] = room[i];
            weights[left] = weights[i];
            left += (room[i] > bound) != small;
        }
        many = left;
    }
    float found = from_order((int32_t)high);
    return found > floor ? found : floor;
}

// The id with the largest exp(x - peak) / waiting among those that reach `floor`.
static int32_t race(const float *x, int64_t n, float peak, float floor, uint64_t seed, int64_t position) {
    const uint64_t key = mix64(mix64(seed) + (uint64_t)(position + 1) * 0x9E3779B97F4A7C15ull);
    U number;
    for (int i = 0; i < WIDTH; i++) number[i] = (uint32_t)i;
    float best = 0.0f;
    int32_t winner = first_of(x, n, peak);
    for (int64_t j = 0; j < n; j += WIDTH) {
        F v = load_padded(x, j, n);
        I left = v >= floor;
        if (!any_lane(left)) continue;
        F w = left ? exp_of(v - peak) : F{};
        F u = uniform_of(number + (uint32_t)j, key);
        // An id waits at least u: most are out before the logarithm. The margin is for rounding.
        if (!any_lane(w * 1.0001f > u * best)) continue;
        F speed = w / waiting_of(u);
        for (int i = 0; i < WIDTH && j + i < n; i++)
            if (speed[i] > best) {
                best = speed[i];
                winner = (int32_t)(j + i);
            }
    }
    return winner;
}

static int32_t choose(const float *logits, int64_t n, const ds_sampling *s, int64_t row, float *room) {
    const float temperature = s->temperature[row];
    const float *x = logits;
    float *own = room;
    room += n;
    if (s->has_setup[row] || temperature >= DS_GREEDY_BELOW) {
        __builtin_memcpy(own, logits, (size_t)n * sizeof(float));
        x = own;
    }
    if (s->has_setup[row]) penalise(own, n, s, row);
    if (!(temperature >= DS_GREEDY_BELOW)) return first_of(x, n, largest(x, n));
    for (int64_t i = 0; i < n; i++) own[i] /= temperature;
    const float peak = largest(x, n);
    float floor = -__builtin_inff();
    if (s->min_p[row] > 0.0f) floor = peak + log_of(splat(s->min_p[row]))[0];
    if (s->top_k[row] > 0 && s->top_k[row] < n) {
        float kth = kth_largest(x, n, s->top_k[row], room);
        floor = kth > floor ? kth : floor;
    }
    if (s->top_p[row] < 1.0f) floor = nucleus(x, n, peak, floor, s->top_p[row], room);
    return race(x, n, peak, floor, s->seed[row], s->position[row]);
}

// ---- log-probabilities -----------------------------------------------------------------------------------------------

static void score_row(const float *x, int64_t n, const ds_sampling *s, int64_t row) {
    const float peak = largest(x, n), mine = x[s->ids[row]];
    const int64_t asked = s->logprobs[row] < n ? s->logprobs[row] : n;
    float *top = s->top_values + row * s->top;
    int32_t *top_ids = s->top_ids + row * s->top;
    double sum = 0;
    int32_t above = 0;
    int64_t have = 0;
    for (int64_t j = 0; j < n; j += WIDTH) {
        F v = load_padded(x, j, n);
        sum += sum_lanes(exp_of(v - peak));
        if (any_lane(v > mine))
            for (int i = 0; i < WIDTH; i++) above += v[i] > mine;
        if (!asked || (have == asked && !any_lane(v > top[have - 1]))) continue;
        for (int64_t i = j; i < j + WIDTH && i < n; i++) {  // keep the largest, the lowest ids among equals, in order
            if (have == asked && !(x[i] > top[have - 1])) continue;
            int64_t at = have < asked ? have++ : have - 1;
            for (; at > 0 && x[i] > top[at - 1]; at--) top[at] = top[at - 1], top_ids[at] = top_ids[at - 1];
            top[at] = x[i];
            top_ids[at] = (int32_t)i;
        }
    }
    // ln of a sum of at least 1.
    const float whole = peak + log_of(splat((float)sum))[0];
    s->chosen[row] = mine - whole;
    s->rank[row] = above + 1;
    for (int64_t i = 0; i < have; i++) top[i] -= whole;
}

// ---- kernels ---------------------------------------------------------------------------------------------------------

// A row of the widest vocabulary, and twice that to search in, fit a member's scratch.
enum { LARGEST_VOCABULARY = DS_SCRATCH_BYTES / (3 * sizeof(float)) };

// Choose an id for each row: x logits f32 [rows, n], w a ds_sampling.
static void sample(const ds_op *op, const ds_step *, ds_team *team) {
    const ds_sampling *s = (const ds_sampling *)op->w;
    for (int64_t row = ds_take(team); row < s->rows; row = ds_take(team)) {
        const float *logits = (const float *)op->x + row * op->n;
        int32_t id = choose(logits, op->n, s, row, (float *)team->scratch);
        s->ids[row] = id;
        s->last[s->slot[row]] = id;
        if (s->has_setup[row] && s->slots[s->slot[row]].output) s->slots[s->slot[row]].output[id]++;
        if (s->logprobs[row] >= 0) score_row(logits, op->n, s, row);
    }
}

// Log-probabilities of given ids: of a ds_sampling only ids, logprobs, top and what is written are looked at.
static void score(const ds_op *op, const ds_step *, ds_team *team) {
    const ds_sampling *s = (const ds_sampling *)op->w;
    for (int64_t row = ds_take(team); row < s->rows; row = ds_take(team))
        if (s->logprobs[row] >= 0) score_row((const float *)op->x + row * op->n, op->n, s, row);
}

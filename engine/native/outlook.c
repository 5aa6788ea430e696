/* What a task would cost on each TE: the arithmetic of a decision, a TE at a time. What is compared with what, and why, is told
 * in sched/policy.py, each term in docs/scheduling.md.
 *
 * Seconds and tokens everywhere. The caller owns all memory: the TEs' facts are columns by slot (sched/view.py), among them room
 * for what `ds_outlook` finds out about a task; all the other calls are about that task until the next one. A list of slots is
 * never empty.
 */

#include <math.h>
#include <stdint.h>

/* sched/policy.py: WAYS, as what a TE would serve a task */
enum { COLOCATED, PREFILL, DECODE, SEMI, PROMPT, HEIR };

/* sched/costs.py: Costs, whose fields are told there, in its order */
typedef struct {
    double p0, p1, p2, p3, d0, d1, d2, chunk, peer0, peer, tier0, dram, ssd, prompt, found, answer, crowd;
} Costs;

/* sched/view.py: Columns */
typedef struct {
    const int64_t *lender;
    const double *mixes, *sequences, *queued_tokens, *kv_used, *kv_total, *seats, *slow, *last;
    double *load, *compute, *cached; /* of the task's prompt: seconds to load, seconds to compute, tokens not to be computed */
    double *values;                  /* of a list of slots, by index: what they are compared by */
    const int64_t *slot_of;          /* by a TE's number; -1: it isn't there */
    int64_t numbers, slots;          /* how many there are of each */
} View;

/* sched/policy.py: Task */
typedef struct {
    const View *view;
    Costs costs;
    double tokens, length;     /* of the prompt; that the answer will have */
    double ttft_slo, tpot_slo; /* what was promised; infinite: nothing was */
    double block;              /* tokens of a block of keys */
    double home_tokens;        /* of the prompt, which `home` has in an explicit context */
    int64_t home;              /* a slot, or -1 */
    double wait, work, queue, missed; /* WAIT, WORK, QUEUE, MISSED */
    /* What follows is the same on all TEs; `ds_outlook` fills it in. */
    double whole;    /* seconds to compute all of the prompt */
    double queued;   /* seconds to compute a token of a typical prompt */
    double stall;    /* seconds of each step in which a sequence's successors have their prompts computed */
    double step;     /* seconds that a step of this task takes alone */
    double longer;   /* seconds by which all of its steps together make those of another sequence longer */
    double arrivals; /* sequences that come to a TE in a second, in the mean */
} Task;

/* Predictions for a task on one TE: sched/policy.py, Prediction */
typedef struct {
    double load, compute, cached; /* as in the view */
    double tpot;                  /* a token of the answer */
    double wait;                  /* until its prompt's turn */
    double own;                   /* computing the prompt, beside what decodes there */
    double first;                 /* until the first token */
    double rest;                  /* from then on until the last one */
} Prediction;

/* How the beginning of a prompt is best had on a TE. */
typedef struct {
    double load, compute, cached;
} Had;

static double larger(double a, double b) { return a > b ? a : b; }

static double rounded_up(double x) {
    double whole = (double)(int64_t)x;
    return whole < x ? whole + 1.0 : whole;
}

/* To compute `tokens` after `context` others, in as few equal chunks as there can be: Costs.prefill. */
static double prefill(const Costs *c, double tokens, double context) {
    double chunks = rounded_up(tokens / c->chunk), each = tokens / chunks;
    return chunks * c->p0 + tokens * (c->p1 + (c->p2 - 0.5 * c->p3) * each + c->p3 * (context + 0.5 * tokens));
}

/* Until KV of so many tokens is with another TE: Costs.transfer. */
static double transfer(const Costs *c, double tokens) { return c->peer0 + c->peer * tokens; }

/* ---- the prompt ------------------------------------------------------------------------------------------------------ */

/* Where a TE has the first `device` tokens, behind which the tiers have `dram` and `ssd` more: load or recompute, whichever is
 * quicker (the paper's rule, 2.2). */
static Had had(const Task *t, double device, double dram, double ssd) {
    const Costs *c = &t->costs;
    Had best = {0.0, prefill(c, t->tokens - device, device), device};
    double reach = device, load = c->tier0, tiers[2][2] = {{dram, c->dram}, {ssd, c->ssd}};
    for (int i = 0; i < 2; i++) {
        if (tiers[i][0] == 0.0) continue;
        reach += tiers[i][0];
        load += tiers[i][0] * tiers[i][1];
        double compute = prefill(c, t->tokens - reach, reach);
        if (load + compute < best.load + best.compute) best = (Had){load, compute, reach};
    }
    return best;
}

static void put(const View *v, int64_t slot, Had it) {
    v->load[slot] = it.load;
    v->compute[slot] = it.compute;
    v->cached[slot] = it.cached;
}

/* A task is looked at: what is the same on all TEs, and what each has of its prompt. Of TEs with the numbers `tes`, none
 * negative, each has so many of its first `blocks` on the device, behind which so many are in DRAM and on SSD; the last row of
 * `tiers`, which is one longer, is of all the others. */
void ds_outlook(Task *t, const int64_t *tes, const int64_t *blocks, const int64_t (*tiers)[2], int64_t count) {
    const Costs *c = &t->costs;
    const View *v = t->view;
    double successor = larger(c->prompt - c->found, 1.0); /* tokens that are computed, of its prompt */
    double instead = c->d0 * rounded_up(successor / c->chunk); /* what those steps would have begun with */
    double sequences = c->crowd + 1.0, kv = sequences * (c->prompt + c->answer / 2.0);
    double answer = larger(t->length, 1.0);
    t->whole = prefill(c, t->tokens, 0.0);
    t->queued = prefill(c, c->prompt, 0.0) / c->prompt;
    t->stall = larger(prefill(c, successor, c->found) - instead, 0.0) / c->answer;
    t->step = c->d0 + c->d1 + c->d2 * t->tokens;
    t->longer = (answer < c->answer ? answer : c->answer) * (c->d1 + c->d2 * t->tokens);
    t->arrivals = c->crowd / (c->answer * (c->d0 + c->d1 * sequences + c->d2 * kv));

    Had others = had(t, 0.0, tiers[count][0] * t->block, tiers[count][1] * t->block);
    for (int64_t slot = 0; slot < v->slots; slot++) put(v, slot, others);
    Had its = others;
    for (int64_t i = 0; i < count; i++) {
        /* Many have as much as the one before, what several users' prompts begin with; and the tiers are the same for all. */
        if (i == 0 || blocks[i] != blocks[i - 1])
            its = had(t, blocks[i] * t->block, tiers[i][0] * t->block, tiers[i][1] * t->block);
        int64_t slot = tes[i] < v->numbers ? v->slot_of[tes[i]] : -1;
        if (slot >= 0) put(v, slot, its);
    }
    if (t->home >= 0 && t->home_tokens > v->cached[t->home]) put(v, t->home, had(t, t->home_tokens, 0.0, 0.0));
}

/* ---- one TE ---------------------------------------------------------------------------------------------------------- */

static Prediction predict(const Task *t, int64_t slot) {
    const Costs *c = &t->costs;
    const View *v = t->view;
    double sequences = v->sequences[slot], kv = v->kv_used[slot] + v->queued_tokens[slot] + t->tokens;
    double slow = v->slow[slot];
    Prediction p = {.load = v->load[slot], .compute = v->compute[slot], .cached = v->cached[slot]};
    /* What the sequences of the TE add to a step, as an idle machine would have it. */
    double busy = c->d1 * sequences + c->d2 * v->kv_used[slot];
    /* Where a TE computes prompts too, each of its sequences is followed by another one once an answer is over, whose prompt
     * makes steps of all of them that longer. */
    p.tpot = (busy + t->stall * v->mixes[slot] * sequences + t->step) * slow;
    /* Prompts given to it before are computed first, in steps that its decodes make longer. Where seats or KV are short, so many
     * of its sequences must end; all that run now will have ended after as many steps as an answer is long. */
    double full = larger(larger(kv / v->kv_total[slot], (sequences + 1.0) / v->seats[slot]), 1.0);
    p.wait = v->queued_tokens[slot] * (busy / c->chunk + t->queued) * slow + (full - 1.0) * (p.tpot * c->answer);
    p.own = (p.compute + busy * ((t->tokens - p.cached) / c->chunk)) * slow;
    p.first = p.wait + p.load + p.own;
    p.rest = larger(t->length - 1.0, 0.0) * p.tpot;
    return p;
}

void ds_predict(const Task *t, int64_t slot, Prediction *out) { *out = predict(t, slot); }

/* What the prompt costs all tasks, where it has its first token after `first` seconds, `wait` of them before its turn and `own`
 * of them computing. A second of waiting costs more than itself. Those who were there before, `sequences`, wait while it is
 * computed: those before it in the queue are decoding by then. So do those who come while it is queued. */
static double asked(const Task *t, double first, double wait, double own, double sequences) {
    double held_up = sequences + t->work * t->costs.crowd + t->queue * t->arrivals * wait;
    return first + t->wait * t->costs.crowd * wait + held_up * own;
}

/* ... and the rest of the answer: each step of those who are there is longer by one more sequence; and what is promised. */
static double after(const Task *t, int64_t slot, const Prediction *p) {
    double answer = larger(t->length, 1.0), late = larger(p->tpot - t->tpot_slo, 0.0);
    return p->rest + t->longer * t->view->sequences[slot] * t->view->slow[slot] + t->missed * (answer - 1.0) * late;
}

static double missed(const Task *t, double first) { return t->missed * larger(first - t->ttft_slo, 0.0); }

/* What the task costs all tasks together on a TE in one way, and the seconds of that until the `first` token. `quicker`: the
 * part of the time on the TEs that the heat map takes off. A missed first token is of both halves of a pair: not here. */
static double cost(const Task *t, int way, int64_t slot, double quicker, double *first) {
    const Costs *c = &t->costs;
    const View *v = t->view;
    Prediction p = predict(t, slot);
    double sequences = v->sequences[slot];
    *first = p.first;
    if (way == PROMPT) return asked(t, p.first, p.wait, p.own, sequences) + missed(t, p.first);
    if (way == PREFILL) return asked(t, p.first, p.wait, p.own, sequences) - quicker * p.own;
    double answer = after(t, slot, &p);
    if (way == COLOCATED) return asked(t, p.first, p.wait, p.own, sequences) + answer + missed(t, p.first);
    *first = p.wait;
    if (way == HEIR) return answer + p.wait + transfer(c, t->tokens - p.cached);
    if (way == DECODE) { /* all of the prompt is brought but what is there already */
        double brought = (1.0 - quicker) * transfer(c, t->tokens), spared = (1.0 - quicker) * c->peer * p.cached;
        return answer + (1.0 + t->wait * c->crowd) * p.wait + brought - quicker * p.rest - spared;
    }
    /* SEMI: a worker computes in the pool of its lender, which decodes. */
    int64_t lender = v->lender[slot];
    Prediction l = predict(t, lender);
    double own = l.compute * v->slow[slot], wait = p.wait + l.wait;
    *first = wait + l.load + own;
    double both = asked(t, *first, wait, own, v->sequences[lender]) + after(t, lender, &l);
    return both - quicker * (own + l.rest) + missed(t, *first);
}

/* ---- which of several ------------------------------------------------------------------------------------------------ */

/* Which one is the best, and which that is: sched/policy.py, Best. */
typedef struct {
    double quicker;   /* the part of the time on the TEs that the heat map takes off */
    double price;     /* what a second until the first token costs more */
    double tolerance; /* costs are equal to within this part of the least time to the first token */
    double near;      /* ... and so many seconds */
    int64_t slot;
    double cost, first; /* the price isn't in it */
    double least_first; /* of all that were asked about */
} Best;

/* Of the least value, to within `near`, the TE that was given nothing for longest, then the lowest in the list: its index. */
static int64_t longest_waiting(const View *v, double near, const int64_t *slots, int64_t count) {
    int64_t best = 0;
    for (int64_t i = 1; i < count; i++)
        if (v->values[i] < v->values[best]) best = i;
    double most = v->values[best] + near;
    for (int64_t i = 0; i < count; i++) {
        double last = v->last[slots[i]], its = v->last[slots[best]];
        if (v->values[i] <= most && (last < its || (last == its && i < best))) best = i;
    }
    return best;
}

/* Fills in the rest of `best`. */
void ds_best(const Task *t, int way, const int64_t *slots, int64_t count, Best *best) {
    double *values = t->view->values, first;
    for (int64_t i = 0; i < count; i++) {
        values[i] = cost(t, way, slots[i], best->quicker, &first);
        if (best->price > 0.0) values[i] += best->price * first;
        if (i == 0 || first < best->least_first) best->least_first = first;
    }
    best->slot = slots[longest_waiting(t->view, best->near + best->tolerance * best->least_first, slots, count)];
    best->cost = cost(t, way, best->slot, best->quicker, &best->first);
}

/* What the paper calls load: what a TE has to do before it is through with the task, but for its prompt. */
static double load(const Task *t, int way, int64_t slot) {
    Prediction p = predict(t, slot);
    if (way == PREFILL || way == PROMPT) return p.wait;
    if (way != SEMI) return p.wait + p.rest;
    Prediction l = predict(t, t->view->lender[slot]);
    return l.wait + l.rest + p.wait;
}

/* Seconds that are saved by what there is of the prompt. */
static double saved(const Task *t, int way, int64_t slot) {
    const View *v = t->view;
    int64_t holder = way == SEMI ? v->lender[slot] : slot;
    return t->whole - v->compute[holder] - v->load[holder];
}

/* sched/policy.py: Loads */
typedef struct {
    double mean, most; /* load */
    double saved;      /* most that one of them saves */
} Loads;

/* The loads of the slots, for `ds_least_load` too. */
void ds_loads(const Task *t, int way, const int64_t *slots, int64_t count, Loads *out) {
    double sum = 0.0;
    for (int64_t i = 0; i < count; i++) {
        double its = t->view->values[i] = load(t, way, slots[i]), spares = saved(t, way, slots[i]);
        sum += its;
        if (i == 0 || its > out->most) out->most = its;
        if (i == 0 || spares > out->saved) out->saved = spares;
    }
    out->mean = sum / (double)count;
}

/* The slot with the least load, of those that save at least so much; and that `load`. */
int64_t ds_least_load(const Task *t, int way, const int64_t *slots, int64_t count, double at_least, double *load) {
    for (int64_t i = 0; i < count; i++)
        if (saved(t, way, slots[i]) < at_least) t->view->values[i] = INFINITY;
    int64_t best = longest_waiting(t->view, 0.0, slots, count);
    *load = t->view->values[best];
    return slots[best];
}

// Some rows at a time, one per lane, and what row_math.h makes of their statistics: what rows.h and lanes.h share. What lanes
// without a row compute, and those whose row does not count, is not used.
//
// Included once per instruction set, like simd.h.

constexpr int kMaxLanes = 256;

template <class A>
struct GroupSums {
  LossSum<A> loss;  // 0 for kNone
  int64_t n_correct = 0;
  RowSums total() const { return {loss.total(), n_correct}; }
};

template <class A>
struct GroupState {
  static constexpr int N = kMaxLanes, W = Simd<A>::W;
  static constexpr int64_t kNoCol = INT64_MIN;
  using V = Vector<A>;
  using Int = typename Simd<A>::Int;
  using Longs = typename Simd<double>::I;

  alignas(64) A max[N], rest[N], x_t[N], x_b[N], w_t[N], w_b[N], k_t[N], k_b[N], shift[N], smooth_sum[N], weight_total[N];
  alignas(64) A g[N], loss[N], lse[N], p[N], constant[N], smooth[N], at_t[N], at_b[N];
  alignas(64) A gap_sum[N], gap_max[N];  // for the entropy; gap_max: in lanes.h the maximum that gap_sum is relative to
  alignas(64) A live[N];           // 1: the row counts, and in the backward has a coefficient other than 0; else 0
  // Columns of the labels, which may lie outside a shard; kNoCol: none, for soft targets and lanes that are not live.
  int64_t target[N], target_b[N];

  // Lanes [0, lanes) for rows [row, row + n): their targets and coefficients.
  void begin_forward(const Problem& problem, const Terms<A>& terms, int64_t row, int n, int lanes, A coefficient) {
    read_targets(problem, terms, row, n, lanes);
    for (int lane = 0; lane < lanes; lane += W) {
      V factor = broadcast(coefficient);
      if (terms.sample_weight) factor *= load_rows<A>(terms.sample_weight + row, lane, n);
      store(g + lane, factor), store(max + lane, broadcast(-kInfinity<A>)), store(rest + lane, V{});
      if (terms.entropy) store(gap_sum + lane, V{}), store(gap_max + lane, broadcast(-kInfinity<A>));
    }
    weigh_targets(terms, row, lanes);
  }
  // The same, and the statistics of the forward; x: the logits of the first row.
  template <class T>
  void begin_backward(const Problem& problem, const Terms<A>& terms, const T* x, int64_t row, int n, int lanes) {
    const int64_t n_rows = problem.n_rows();
    const A *head = static_cast<const A*>(problem.saved), *whole_rows = static_cast<const A*>(problem.shard_stats);
    const A* saved = (whole_rows ? whole_rows : head + kState) + row;
    read_targets(problem, terms, row, n, lanes);
    for (int lane = 0; lane < lanes; lane += W) {
      V factor = broadcast(head[0]);
      if (problem.selects_rows()) factor = selected(saved + 2 * n_rows, lane, n, head);
      factor *= load_dloss<T, A>(problem, row, lane, n);
      if (terms.sample_weight) factor *= load_rows<A>(terms.sample_weight + row, lane, n);
      const V counted = load(live + lane);
      factor = counted != V{} ? factor : V{};  // not times 0: the upstream gradient may be infinite
      store(g + lane, factor), store(live + lane, factor != V{} ? counted : V{});
    }
    for (int lane = 0; lane < lanes; ++lane)
      if (live[lane] == 0) target[lane] = target_b[lane] = kNoCol;
    for (int lane = 0; lane < lanes; lane += W) {
      const auto is_live = V(load(live + lane)) != V{};
      store(max + lane, is_live ? load_rows<A>(saved, lane, n) : V{});
      store(rest + lane, is_live ? load_rows<A>(saved + n_rows, lane, n) : broadcast(A(1)));
      if (terms.soft) store(weight_total + lane, is_live ? load_rows<A>(saved + 3 * n_rows, lane, n) : V{});
    }
    weigh_targets(terms, row, lanes);
    if (terms.soft) return;
    if (whole_rows) {
      for (int lane = 0; lane < n; ++lane) {
        if (target[lane] != kNoCol) x_t[lane] = saved[2 * n_rows + lane];
        if (terms.two_labels && target_b[lane] != kNoCol) x_b[lane] = saved[5 * n_rows + lane];
      }
      return;
    }
    gather_logits(problem, terms, x, n, target, x_t);
    if (terms.two_labels) gather_logits(problem, terms, x, n, target_b, x_b);
  }

  // Whether this shard of the row, which is all of it but for sharded classes, has that column.
  static INLINE bool is_here(const Problem& problem, int64_t col) { return col >= 0 && col < problem.n_cols; }

  INLINE RowStats<A> stats(const Terms<A>& terms, int lane) const {
    auto of_b = [&](const A* values) { return terms.two_labels ? Vector<A>(load(values + lane)) : Vector<A>{}; };
    const V m = load(max + lane), x = load(x_t + lane), e = terms.soft ? V{} : exp_nonpositive(x - m);
    return {m,         load(rest + lane), x,         of_b(x_b),          e, load(w_t + lane),
            of_b(w_b), load(k_t + lane),  of_b(k_b), load(shift + lane), load(smooth_sum + lane), load(weight_total + lane)};
  }
  // Losses of all rows from their statistics, and what else the caller wants to know of them.
  void finish_forward(const Problem& problem, const Terms<A>& terms, int64_t row, int n, GroupSums<A>& sums) {
    if (problem.shard_stats) return store_shard(problem, terms, row, n);
    for (int lane = 0; lane < n; lane += W) {
      RowStats<A> s = stats(terms, lane);
      const V log_d = log_sum(s, terms), counted = load(live + lane);
      if (terms.focal_gamma != 0) s.k_t *= Focal<A>(s, terms, log_d).of_loss;
      V losses = row_loss<A>(s, terms, log_d);
      if (terms.sample_weight) losses *= load_rows<A>(terms.sample_weight + row, lane, n);
      store(loss + lane, counted != V{} ? losses : V{}), store(lse + lane, counted != V{} ? s.max + log_d : V{});
      if (terms.entropy) store(gap_sum + lane, counted != V{} ? entropy(s, load(gap_sum + lane), log_d) : V{});
    }
    store_rows(problem, row, n);
    for (int lane = 0; lane < n && problem.reduction != kNone; lane += W) sums.loss.add(load(loss + lane));
    if (!problem.row_stats) return;
    A* row_stats = static_cast<A*>(problem.row_stats) + row;
    copy(row_stats, lse, n), copy(row_stats + problem.n_rows(), loss, n), copy(row_stats + 2 * problem.n_rows(), gap_sum, n);
    for (int lane = 0; lane < n; ++lane) sums.n_correct += live[lane] != 0 && is_correct(terms, lane, row + lane);
  }
  // Factors of all gradients. Of rows that are not live at_t is the whole gradient, 0.
  void factors(const Terms<A>& terms, int n) {
    for (int lane = 0; lane < n; lane += Simd<A>::W) {
      RowStats<A> s = stats(terms, lane);
      if (terms.focal_gamma != 0) s.k_t *= Focal<A>(s, terms, log_sum(s, terms)).of_gradient;
      RowFactors<A> f = row_factors<A>(s, terms, load(g + lane));
      if (terms.capped) {
        f.at_t *= terms.derivative(s.x_t), f.at_b *= terms.derivative(s.x_b);
      } else if (terms.transformed) {
        f.p *= terms.logit_scale, f.constant *= terms.logit_scale, f.smooth *= terms.logit_scale;
        f.at_t *= terms.logit_scale, f.at_b *= terms.logit_scale;
      }
      store(p + lane, f.p), store(constant + lane, f.constant), store(smooth + lane, f.smooth);
      store(at_t + lane, V(load(live + lane)) != V{} ? f.at_t : V{});
      if (terms.two_labels) store(at_b + lane, f.at_b);
    }
  }

 private:
  static INLINE V entropy(const RowStats<A>& s, V gap_sum, V log_d) {
    return log_d + (gap_sum + gap_terms<A>(s.e_t, s.max, s.x_t)) / (s.rest + s.e_t);
  }

  static INLINE void copy(A* to, const A* from, int n) { __builtin_memcpy(to, from, size_t(n) * sizeof(A)); }

  // The coefficients of rows that max and topk selected by their losses; head: of saved.
  static V selected(const A* losses, int lane, int n, const A* head) {
    V factor{};
    const auto threshold = sortable_bits(head[2]);
    for (int i = 0; i < W && lane + i < n; ++i) {
      const auto key = sortable_bits(losses[lane + i]);
      factor[i] = key > threshold ? head[0] : key == threshold ? head[1] : A(0);
    }
    return factor;
  }

  // The transformed logits of columns that this shard has; x: the first row.
  template <class T>
  static void gather_logits(const Problem& problem, const Terms<A>& terms, const T* x, int n, const int64_t* cols, A* to) {
    const int64_t row = problem.logits_strides.row, col = problem.logits_strides.col, n_cols = problem.n_cols;
    const bool transformed = terms.transformed;
    for (int lane = 0; lane < n; ++lane) {
      if (cols[lane] < 0 || cols[lane] >= n_cols) continue;
      const A logit = A(load1(x + lane * row + cols[lane] * col));
      to[lane] = transformed ? terms.transform(broadcast(logit))[0] : logit;
    }
  }

  // The labels, and which rows count; zeros where statistics are added up, or are not known.
  void read_targets(const Problem& problem, const Terms<A>& terms, int64_t row, int n, int lanes) {
    for (int lane = 0; lane < lanes; lane += W)
      store(smooth_sum + lane, V{}), store(weight_total + lane, V{}), store(x_t + lane, V{}), store(shift + lane, V{});
    if (terms.soft) {
      const Longs none = Longs{} + kNoCol;
      for (int lane = 0; lane < lanes; lane += Simd<double>::W) __builtin_memcpy(target + lane, &none, sizeof none);
      for (int lane = 0; lane < lanes; lane += W) store(live + lane, iota<A>() < Int(n - lane) ? broadcast(A(1)) : V{});
    } else {
      problem.target_kind == kUint8 ? read_labels<uint8_t>(problem, row, n) : read_labels<int64_t>(problem, row, n);
      for (int lane = n; lane < lanes; ++lane) target[lane] = target_b[lane] = kNoCol, live[lane] = 0;
    }
  }
  // An index that was changed to one out of range since the first look is not an address: its logit is NaN, and so are loss and
  // gradient of the row.
  template <class Label>
  void read_labels(const Problem& problem, int64_t row, int n) {
    const Label* a = static_cast<const Label*>(problem.target) + row;
    const Label* b = problem.target_b ? static_cast<const Label*>(problem.target_b) + row : a;
    const int64_t ignored = problem.ignore_index, first = problem.first_class;
    const uint64_t n_classes = uint64_t(problem.n_row_cols());
    for (int lane = 0; lane < n; ++lane) {
      const int64_t t = int64_t(a[lane]), u = int64_t(b[lane]);
      const bool counts = t != ignored && u != ignored, are_classes = uint64_t(t) < n_classes && uint64_t(u) < n_classes;
      live[lane] = A(counts), x_t[lane] = counts && !are_classes ? kNaN<A> : A(0);
      target[lane] = counts && are_classes ? t - first : kNoCol;
      target_b[lane] = counts && are_classes ? u - first : kNoCol;
    }
  }
  // The labels' class weights and shares.
  void weigh_targets(const Terms<A>& terms, int64_t row, int lanes) {
    const V one = broadcast(A(1));
    for (int lane = 0; lane < lanes; lane += W) store(w_t + lane, one), store(k_t + lane, one);
    if (terms.weight)
      for (int lane = 0; lane < lanes; ++lane)
        if (target[lane] != kNoCol) w_t[lane] = k_t[lane] = terms.weight[target[lane]];
    if (!terms.two_labels) return;
    for (int lane = 0; lane < lanes; ++lane) {
      x_b[lane] = k_b[lane] = 0, w_b[lane] = 1;
      if (target_b[lane] == target[lane]) {  // one label twice: a has the whole share, so that its gradient does not cancel
        target_b[lane] = kNoCol;
        continue;
      }
      const A share = terms.share(row + lane);
      w_b[lane] = terms.weight ? terms.weight[target_b[lane]] : A(1);
      k_b[lane] = w_b[lane] * (A(1) - share), k_t[lane] *= share;
    }
  }

  // What is kept of the rows for the backward, and for reductions that select among them; or their losses.
  void store_rows(const Problem& problem, int64_t row, int n) const {
    const int64_t n_rows = problem.n_rows();
    if (problem.saved) {
      A* saved = static_cast<A*>(problem.saved) + kState + row;
      copy(saved, max, n), copy(saved + n_rows, rest, n);
      for (int lane = 0; lane < n; lane += W) {
        const V losses = V(load(live + lane)) != V{} ? V(load(loss + lane)) : broadcast(-kInfinity<A>);
        A* to = saved + 2 * n_rows + lane;
        lane + W <= n ? store(to, losses) : store_partial<A, A>(to, n - lane, losses);
      }
      if (problem.has_probabilities()) copy(saved + 3 * n_rows, weight_total, n);
    }
    if (problem.reduction == kNone) store_losses(problem, row, loss, n);
  }
  // The statistics of a shard, smooth_sum around its own maximum, as fusedloss/shards.py merges them.
  void store_shard(const Problem& problem, const Terms<A>& terms, int64_t row, int n) {
    const int64_t n_rows = problem.n_rows();
    A* to = static_cast<A*>(problem.shard_stats) + row;
    for (int lane = 0; lane < n; lane += W) {
      const V total = terms.uniform ? broadcast(A(problem.n_cols)) : V(load(weight_total + lane));
      store(weight_total + lane, total);
      const V moved = finite_max_vector<A>(load(max + lane)) - V(load(shift + lane));
      store(smooth_sum + lane, V(load(smooth_sum + lane)) + total * moved);
    }
    copy(to, max, n), copy(to + n_rows, rest, n), copy(to + 2 * n_rows, x_t, n);
    if (terms.uniform || terms.per_class || terms.two_labels)
      copy(to + 3 * n_rows, weight_total, n), copy(to + 4 * n_rows, smooth_sum, n);
    if (terms.two_labels) copy(to + 5 * n_rows, x_b, n);
    const int64_t n_of_loss = terms.two_labels ? 6 : terms.uniform || terms.per_class ? 5 : 3;
    if (terms.entropy) copy(to + n_of_loss * n_rows, gap_sum, n);
  }
  // Whether the label with the larger share has the largest logit. Of a NaN logit `rest` is NaN; of infinite ones, too.
  bool is_correct(const Terms<A>& terms, int lane, int64_t row) const {
    if (rest[lane] != rest[lane] && max[lane] < kInfinity<A>) return false;
    const bool two = terms.two_labels && target_b[lane] != kNoCol;
    const A share = two ? terms.share(row) : A(1);
    return (x_t[lane] == max[lane] && share >= A(0.5)) || (two && x_b[lane] == max[lane] && share <= A(0.5));
  }
};

// Cuts rows [begin, end) into groups of at most n rows that do not cross an outer block: one stride leads from each to the next.
template <class Body>
INLINE void for_groups(const Problem& problem, int64_t begin, int64_t end, int64_t n, const Body& body) {
  for (int64_t row = begin; row < end;) {
    const int64_t outer_end = (row / problem.n_inner + 1) * problem.n_inner;
    int64_t last = row + n < outer_end ? row + n : outer_end;
    if (last > end) last = end;
    body(row, int(last - row));
    row = last;
  }
}

// Where the classes of a group's rows lie.
template <class T, class A>
struct GroupPointers {
  const T* x;
  T* dx;                 // null without a gradient
  const A* q;            // probabilities, or
  const T* q_as_logits;  // probabilities in the logits' type; both null for class indices
  int64_t x_stride, dx_stride, q_stride;

  GroupPointers(const Problem& problem, int64_t row)
      : x(static_cast<const T*>(problem.logits) + problem.offset(problem.logits_strides, row)),
        dx(problem.dlogits ? static_cast<T*>(problem.dlogits) + problem.offset(problem.dlogits_strides, row) : nullptr),
        q(probabilities<A>(problem, kProbabilities, row)),
        q_as_logits(probabilities<T>(problem, kProbabilitiesAsLogits, row)),
        x_stride(problem.logits_strides.row),
        dx_stride(problem.dlogits_strides.row),
        q_stride(problem.target_strides.row) {}

  GroupPointers row(int lane) const {  // beginning at that row
    GroupPointers other = *this;
    other.x += lane * x_stride;
    if (dx) other.dx += lane * dx_stride;
    if (q) other.q += lane * q_stride;
    if (q_as_logits) other.q_as_logits += lane * q_stride;
    return other;
  }

 private:
  template <class P>
  static const P* probabilities(const Problem& problem, TargetKind kind, int64_t row) {
    if (problem.target_kind != kind) return nullptr;
    return static_cast<const P*>(problem.target) + problem.offset(problem.target_strides, row);
  }
};

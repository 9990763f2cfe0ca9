// Many rows side by side, one per SIMD lane: few classes (CIFAR-10), or classes that are not contiguous ((N, C, d1, ...)).
//
// A group is up to TILE / n_cols rows of one outer block. Its logits are copied once into a tile on the stack, class by class,
// and the tile is overwritten by exp(x - m), then by the gradient, which is copied out: each logit is read once and each
// gradient written once. With more than TILE / W classes there is no tile: groups of DIRECT_LANES rows are read where they
// lie, two or three times; 64 rows of 1000 float32 classes are 256 KB, which L2 holds between the passes.
//
// Included once per instruction set, like simd.h.

constexpr int TILE = 4096;        // values: 16 KB of float32 on the stack and in L1
constexpr int DIRECT_LANES = 64;  // 256 contiguous bytes of float32 per class: whole cache lines, and few enough for L2
constexpr int64_t FLUSH = 16;     // classes summed into one float before it is added to the total: keeps rounding errors small

// Element (lane, c) of some array at base[lane * row + c * col]; lanes from n_lanes on read as 0 and are not written.
template <class T, class A>
struct Block {
  using V = typename Simd<A>::V;
  static constexpr int W = Simd<A>::W;
  T* base;
  int64_t row, col;
  int n_lanes;

  INLINE V get(int64_t c, int lane) const {
    if (row == 1 && lane + W <= n_lanes) return load(base + c * col + lane);
    A values[W];
    for (int i = 0; i < W; ++i) values[i] = lane + i < n_lanes ? A(load1(base + c * col + (lane + i) * row)) : A(0);
    return load(values);
  }
  INLINE void put(int64_t c, int lane, V v) const {
    if (row == 1 && lane + W <= n_lanes) return store(base + c * col + lane, v);
    A values[W];
    store(values, v);
    for (int i = 0; i < W && lane + i < n_lanes; ++i) store1(base + c * col + (lane + i) * row, values[i]);
  }
};

// The logits of a group: in a tile of stride n_lanes rounded up to W, or where they lie.
template <class T, class A, bool TILED>
struct Group {
  using V = typename Simd<A>::V;
  static constexpr int W = Simd<A>::W;
  Block<const T, A> x;
  int lanes;  // n_lanes rounded up to W
  alignas(64) A tile[TILED ? TILE : 1];

  Group(const Block<const T, A>& block, int64_t n_cols) : x(block), lanes((block.n_lanes + W - 1) / W * W) {
    if constexpr (TILED) {
      if (x.col == 1 && x.row != 1) {  // in the order of memory, not of the tile
        for (int lane = 0; lane < x.n_lanes; ++lane)
          for (int64_t c = 0; c < n_cols; ++c) tile[c * lanes + lane] = load1(x.base + lane * x.row + c);
        for (int64_t c = 0; c < n_cols; ++c)
          for (int lane = x.n_lanes; lane < lanes; ++lane) tile[c * lanes + lane] = 0;
      } else {
        for (int64_t c = 0; c < n_cols; ++c)
          for (int lane = 0; lane < lanes; lane += W) store(tile + c * lanes + lane, x.get(c, lane));
      }
    }
  }
  INLINE V get(int64_t c, int lane) const {
    if constexpr (TILED) return load(tile + c * lanes + lane);
    return x.get(c, lane);
  }
};

// Fills max, rest, x_t, shift, smooth, soft of all lanes; leaves exp(x - max) in a tile.
template <class T, class A, Terms terms, bool TILED>
void lane_stats(const Problem& problem, Group<T, A, TILED>& group, const Block<const A, A>& q, GroupState<A>& s) {
  using V = typename Simd<A>::V;
  using I = typename Simd<A>::I;
  constexpr int W = Simd<A>::W;
  const A* w = static_cast<const A*>(problem.weight);
  const A keep = A(1) - A(problem.smoothing), add = A(problem.smoothing) / A(problem.n_cols);
  const V zero = {};
  for (int lane = 0; lane < group.lanes; lane += W) {
    V m = broadcast(-kInfinity<A>);
    for (int64_t c = 0; c < problem.n_cols; ++c) {
      V v = group.get(c, lane);
      m = max_(v, m);
    }
    V finite = finite_max_vector<A>(m), rest{}, x_t{}, smooth{}, soft{};
    I target;
    __builtin_memcpy(&target, s.target + lane, sizeof target);
    for (int64_t start = 0; start < problem.n_cols; start += FLUSH) {
      V part{}, smooth_part{}, soft_part{};
      int64_t end = start + FLUSH < problem.n_cols ? start + FLUSH : problem.n_cols;
      for (int64_t c = start; c < end; ++c) {
        V v = group.get(c, lane);
        V e = exp_nonpositive(v - finite);
        if constexpr (TILED) store(group.tile + c * group.lanes + lane, e);
        if constexpr (!is_soft(terms)) {
          I at_target = target == typename Simd<A>::Int(c);
          x_t = at_target ? v : x_t;
          e = at_target ? zero : e;
        }
        part += e;
        if constexpr (terms == kSmooth) smooth_part += finite - v;
        if constexpr (terms == kSmoothWeighted) smooth_part += w[c] * (finite - v);
        if constexpr (is_soft(terms)) {
          V qv = q.get(c, lane) * keep + add;
          if constexpr (terms == kSoftWeighted) qv *= w[c];
          smooth_part += qv * (finite - v);
          soft_part += qv;
        }
      }
      rest += part, smooth += smooth_part, soft += soft_part;
    }
    store(s.max + lane, m), store(s.rest + lane, rest), store(s.x_t + lane, x_t), store(s.shift + lane, finite);
    store(s.smooth + lane, smooth), store(s.soft + lane, soft);
  }
}

// Writes the gradients of a group from the factors in s; a lane that is not live gets its at_target (0, or NaN) everywhere.
template <class T, class A, Terms terms, bool TILED, bool TILE_HAS_EXP>
void lane_gradient(const Problem& problem, Group<T, A, TILED>& group, const Block<const A, A>& q, const Block<T, A>& dx,
                   GroupState<A>& s) {
  using V = typename Simd<A>::V;
  using I = typename Simd<A>::I;
  constexpr int W = Simd<A>::W;
  const A* w = static_cast<const A*>(problem.weight);
  const A keep = A(1) - A(problem.smoothing), add = A(problem.smoothing) / A(problem.n_cols);
  for (int lane = 0; lane < group.lanes; lane += W) {
    I target, live;
    __builtin_memcpy(&target, s.target + lane, sizeof target);
    for (int i = 0; i < W; ++i) live[i] = s.live[lane + i] ? -1 : 0;
    V m = finite_max_vector<A>(load(s.max + lane)), p = load(s.p + lane), at_target = load(s.at_target + lane);
    V smooth = load(s.smooth_factor + lane), soft = load(s.soft_factor + lane);
    for (int64_t c = 0; c < problem.n_cols; ++c) {
      V v = group.get(c, lane);
      V d = (TILED && TILE_HAS_EXP ? v : exp_nonpositive(v - m)) * p;
      if constexpr (!is_soft(terms)) d = target == typename Simd<A>::Int(c) ? at_target : d;
      if constexpr (terms == kSmooth) d -= smooth;
      if constexpr (terms == kSmoothWeighted) d -= smooth * w[c];
      if constexpr (terms == kSoft) d -= soft * (q.get(c, lane) * keep + add);
      if constexpr (terms == kSoftWeighted) d -= soft * ((q.get(c, lane) * keep + add) * w[c]);
      d = live ? d : at_target;  // 0 times an infinite or NaN statistic would be NaN
      if constexpr (TILED) {
        store(group.tile + c * group.lanes + lane, d);
      } else {
        dx.put(c, lane, d);
      }
    }
  }
  if constexpr (TILED) {
    if (dx.col == 1 && dx.row != 1) {
      for (int lane = 0; lane < dx.n_lanes; ++lane)
        for (int64_t c = 0; c < problem.n_cols; ++c) store1(dx.base + lane * dx.row + c, group.tile[c * group.lanes + lane]);
    } else {
      for (int64_t c = 0; c < problem.n_cols; ++c)
        for (int lane = 0; lane < group.lanes; lane += W) dx.put(c, lane, load(group.tile + c * group.lanes + lane));
    }
  }
}

// Rows [row, row + n_lanes) of one outer block.
template <class T, Terms terms, bool TILED>
double forward_group(const Problem& problem, int64_t row, int n_lanes, double coefficient, double weight_total) {
  using A = typename Accumulate<T>::type;
  const Strides &xs = problem.logits_strides, &qs = problem.target_strides, &ds = problem.dlogits_strides;
  GroupState<A> s;
  Group<T, A, TILED> group({static_cast<const T*>(problem.logits) + problem.offset(xs, row), xs.row, xs.col, n_lanes},
                           problem.n_cols);
  const A* targets = static_cast<const A*>(problem.target);
  Block<const A, A> q = {is_soft(terms) ? targets + problem.offset(qs, row) : nullptr, qs.row, qs.col, n_lanes};
  for (int lane = 0; lane < group.lanes; ++lane)
    s.template begin_forward<terms>(problem, lane, row + lane, lane < n_lanes, A(coefficient));
  lane_stats<T, A, terms, TILED>(problem, group, q, s);
  const double total = s.template finish_forward<terms>(problem, row, n_lanes, A(weight_total));
  if (problem.dlogits) {
    s.template factors<terms>(problem, group.lanes, A(weight_total));
    Block<T, A> dx = {static_cast<T*>(problem.dlogits) + problem.offset(ds, row), ds.row, ds.col, n_lanes};
    lane_gradient<T, A, terms, TILED, true>(problem, group, q, dx, s);
  }
  return total;
}

template <class T, Terms terms, bool TILED>
void backward_group(const Problem& problem, int64_t row, int n_lanes) {
  using A = typename Accumulate<T>::type;
  const Strides &xs = problem.logits_strides, &qs = problem.target_strides, &ds = problem.dlogits_strides;
  GroupState<A> s;
  Group<T, A, TILED> group({static_cast<const T*>(problem.logits) + problem.offset(xs, row), xs.row, xs.col, n_lanes},
                           problem.n_cols);
  const A* targets = static_cast<const A*>(problem.target);
  Block<const A, A> q = {is_soft(terms) ? targets + problem.offset(qs, row) : nullptr, qs.row, qs.col, n_lanes};
  for (int lane = 0; lane < group.lanes; ++lane) {
    s.template begin_backward<terms>(problem, lane, row + lane, lane < n_lanes);
    if (!s.live[lane]) continue;
    if constexpr (is_soft(terms)) {
      s.soft[lane] = soft_total<A, terms>(problem, q.base + lane * qs.row, qs.col);
    } else {
      s.x_t[lane] = load1(group.x.base + lane * xs.row + int64_t(s.target[lane]) * xs.col);
    }
  }
  s.template factors<terms>(problem, group.lanes, static_cast<const A*>(problem.saved)[3]);
  Block<T, A> dx = {static_cast<T*>(problem.dlogits) + problem.offset(ds, row), ds.row, ds.col, n_lanes};
  lane_gradient<T, A, terms, TILED, false>(problem, group, q, dx, s);
}

// Cuts rows [begin, end) into groups that do not cross an outer block.
template <class A, class Body>
INLINE void for_groups(const Problem& problem, int64_t begin, int64_t end, bool tiled, const Body& body) {
  int64_t lanes = tiled ? TILE / problem.n_cols / Simd<A>::W * Simd<A>::W : DIRECT_LANES;
  if (lanes > MAX_LANES) lanes = MAX_LANES;
  for (int64_t row = begin; row < end;) {
    int64_t outer_end = (row / problem.n_inner + 1) * problem.n_inner, last = row + lanes;
    if (last > outer_end) last = outer_end;
    if (last > end) last = end;
    body(row, int(last - row));
    row = last;
  }
}

template <class T, Terms terms>
double forward_lanes(const Problem& problem, int64_t begin, int64_t end, double coefficient, double weight_total) {
  using A = typename Accumulate<T>::type;
  double total = 0;
  bool tiled = problem.n_cols <= TILE / Simd<A>::W;
  for_groups<A>(problem, begin, end, tiled, [&](int64_t row, int n_lanes) {
    total += tiled ? forward_group<T, terms, true>(problem, row, n_lanes, coefficient, weight_total)
                   : forward_group<T, terms, false>(problem, row, n_lanes, coefficient, weight_total);
  });
  return total;
}

template <class T, Terms terms>
void backward_lanes(const Problem& problem, int64_t begin, int64_t end) {
  using A = typename Accumulate<T>::type;
  bool tiled = problem.n_cols <= TILE / Simd<A>::W;
  for_groups<A>(problem, begin, end, tiled, [&](int64_t row, int n_lanes) {
    tiled ? backward_group<T, terms, true>(problem, row, n_lanes) : backward_group<T, terms, false>(problem, row, n_lanes);
  });
}

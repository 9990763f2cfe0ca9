// Many rows side by side, one per SIMD lane: few classes (CIFAR-10), or classes that are not contiguous ((N, C, d1, ...)).
//
// A group is up to kMaxLanes rows of one outer block. A block of its logits is copied into a tile, class by class, where it is
// overwritten by exp(x - m), then by the gradient, which is copied out. Up to 256 classes fit the tile: each logit is read once
// and each gradient written once. With more, the group takes block after block, as rows.h does, and the gradient reads the
// logits once more: 64 rows of 1000 float32 classes are 256 KB, which L2 holds between the passes.
//
// Included once per instruction set, like simd.h.

constexpr int64_t kTileInL1 = 4096;  // values: 16 KB of float32
constexpr int64_t kTile = 16384;     // values, in L2
// 256 bytes of float32 per class, whole cache lines. 24 lanes, for which L1 has room at 150 classes, took twice the time.
constexpr int64_t kWideLanes = 64;
constexpr int64_t kFlush = 16;  // classes summed into one float before it is added to the total: keeps rounding errors small

// Lanes of a group, rounded up to whole vectors, and the columns of its tile.
template <class A>
struct Tile {
  int lanes;
  int64_t cols;

  A& at(int64_t c, int lane) { return z[c * lanes + lane]; }
  static bool has(int64_t col, int64_t start, int64_t n) { return col >= start && col < start + n; }

  alignas(64) A z[kTile], a[kTile], dz[kTile];
  GroupState<A> state;
};

// Asks for the lanes of a class some way ahead of class c. Classes lie a page or more apart: the hardware does not
// prefetch them. Without this, 150 float32 classes of 64 x 64 pixels took 1.25 times as long, 1000 took 1.5 times.
template <bool FOR_WRITING, class T>
INLINE void prefetch_class(const T* lanes, int64_t col, int n_lanes, int64_t c, int64_t n_cols) {
  const int64_t ahead = n_cols < 64 ? n_cols / 2 : 32;
  if (c + ahead >= n_cols) return;
  const char* bytes = reinterpret_cast<const char*>(lanes + (c + ahead) * col);
  for (int64_t i = 0; i < n_lanes * int64_t(sizeof(T)); i += 64) __builtin_prefetch(bytes + i, FOR_WRITING);
}

// to[c * lanes + lane] = from[lane * row + c * col]; 0 in lanes without a row.
template <class T, class A>
void load_tile(A* to, int lanes, const T* from, int64_t row, int64_t col, int n_lanes, int64_t n_cols) {
  constexpr int W = Simd<A>::W;
  if (row == 1) {
    for (int64_t c = 0; c < n_cols; ++c) {
      prefetch_class<false>(from, col, n_lanes, c, n_cols);
      for (int lane = 0; lane < lanes; lane += W) {
        const T* at = from + c * col + lane;
        store(to + c * lanes + lane, lane + W <= n_lanes ? Vector<A>(load(at)) : load_partial<A, T>(at, n_lanes - lane));
      }
    }
    return;
  }
  for (int lane = 0; lane < lanes; lane += W) {  // a vector of rows at a time: nearly the order of memory
    if (is_transposed<A>(col, n_lanes - lane, n_cols)) {
      load_transposed(to + lane, lanes, from + lane * row, row, n_cols);
      continue;
    }
    for (int64_t c = 0; c < n_cols; ++c) {
      const T* at = from + lane * row + c * col;
      Vector<A> v{};
      if (lane + W <= n_lanes) {
        UNROLL for (int i = 0; i < W; ++i) v[i] = load1(at + i * row);
      } else {
        for (int i = 0; i < n_lanes - lane; ++i) v[i] = load1(at + i * row);
      }
      store(to + c * lanes + lane, v);
    }
  }
}

template <class T, class A>
void store_tile(T* to, const A* from, int lanes, int64_t row, int64_t col, int n_lanes, int64_t n_cols) {
  constexpr int W = Simd<A>::W;
  if (row == 1) {
    for (int64_t c = 0; c < n_cols; ++c) {
      prefetch_class<true>(to, col, n_lanes, c, n_cols);
      for (int lane = 0; lane < lanes; lane += W) {
        const Vector<A> v = load(from + c * lanes + lane);
        T* at = to + c * col + lane;
        lane + W <= n_lanes ? store(at, v) : store_partial<A, T>(at, n_lanes - lane, v);
      }
    }
    return;
  }
  for (int lane = 0; lane < n_lanes; lane += W) {
    if (is_transposed<A>(col, n_lanes - lane, n_cols)) {
      store_transposed(to + lane * row, from + lane, lanes, row, n_cols);
      continue;
    }
    for (int64_t c = 0; c < n_cols; ++c) {
      const Vector<A> v = load(from + c * lanes + lane);
      T* at = to + lane * row + c * col;
      if (lane + W <= n_lanes) {
        UNROLL for (int i = 0; i < W; ++i) store1(at + i * row, v[i]);
      } else {
        for (int i = 0; i < n_lanes - lane; ++i) store1(at + i * row, v[i]);
      }
    }
  }
}

// Fills tile.a with a_c of classes [start, start + n).
template <class T, class A>
void load_tile_weights(const Problem& problem, const Terms<A>& terms, Tile<A>& tile, const GroupPointers<T, A>& at, int n_lanes,
                 int64_t start, int64_t n) {
  const Strides& strides = problem.target_strides;
  const int64_t first = start * strides.col;
  if (at.q) load_tile<A, A>(tile.a, tile.lanes, at.q + first, strides.row, strides.col, n_lanes, n);
  if (at.q_as_logits) load_tile<T, A>(tile.a, tile.lanes, at.q_as_logits + first, strides.row, strides.col, n_lanes, n);
  if (terms.soft && !terms.weight && terms.smoothing == 0) return;  // they are the probabilities
  for (int64_t c = 0; c < n; ++c) {
    const Vector<A> w = broadcast(terms.weight ? terms.weight[start + c] : A(1));
    for (int lane = 0; lane < tile.lanes; lane += Simd<A>::W) {
      A* a = tile.a + c * tile.lanes + lane;
      store(a, terms.class_weight(terms.soft ? Vector<A>(load(a)) : Vector<A>{}, w));
    }
  }
}

// Fills tile.z with the transformed logits of classes [start, start + n), and tile.dz with dz/dx where it differs between them.
template <class T, class A>
void load_logits(const Problem& problem, const Terms<A>& terms, Tile<A>& tile, const T* x, int n_lanes, int64_t start,
                 int64_t n) {
  const Strides& strides = problem.logits_strides;
  load_tile<T, A>(tile.z, tile.lanes, x + start * strides.col, strides.row, strides.col, n_lanes, n);
  if (!terms.transformed) return;
  for (int64_t i = 0; i < n * tile.lanes; i += Simd<A>::W) {
    const Vector<A> z = terms.transform(load(tile.z + i));
    store(tile.z + i, z);
    if (terms.capped) store(tile.dz + i, terms.derivative(z));
  }
}

// tile.z = exp(tile.z - m)
template <class A>
void exp_tile(Tile<A>& tile, int64_t n, const GroupState<A>& s) {
  for (int lane = 0; lane < tile.lanes; lane += Simd<A>::W) {
    const Vector<A> m = finite_max_vector<A>(load(s.max + lane));
    for (A* z = tile.z + lane; z < tile.z + n * tile.lanes; z += tile.lanes) store(z, exp_nonpositive(Vector<A>(load(z)) - m));
  }
}

// The same, and adds them to the sums. Not inline: the code around it would be slower.
template <class A>
__attribute__((noinline)) void exp_tile_with_sums(Tile<A>& tile, int64_t n, GroupState<A>& s) {
  using V = Vector<A>;
  for (int lane = 0; lane < tile.lanes; lane += Simd<A>::W) {
    const V m = finite_max_vector<A>(load(s.max + lane));
    V sum = load(s.rest + lane);
    for (int64_t flush = 0; flush < n; flush += kFlush) {
      V part{};
      for (int64_t c = flush; c < n && c < flush + kFlush; ++c) {
        const V e = exp_nonpositive(V(load(tile.z + c * tile.lanes + lane)) - m);
        store(tile.z + c * tile.lanes + lane, e), part += e;
      }
      sum += part;
    }
    store(s.rest + lane, sum);
  }
}

// The same for the sums of the entropy, with s.rest for what came before.
template <class A>
__attribute__((noinline)) void exp_tile_with_gaps(Tile<A>& tile, int64_t n, GroupState<A>& s) {
  using V = Vector<A>;
  for (int lane = 0; lane < tile.lanes; lane += Simd<A>::W) {
    const V max = load(s.max + lane), m = finite_max_vector<A>(max), before = load(s.gap_max + lane);
    V sum = V(load(s.gap_sum + lane)) * exp_nonpositive(before - m) + V(load(s.rest + lane)) * (m - finite_max_vector<A>(before));
    for (int64_t flush = 0; flush < n; flush += kFlush) {
      V part{};
      for (int64_t c = flush; c < n && c < flush + kFlush; ++c) {
        const V z = load(tile.z + c * tile.lanes + lane), e = exp_nonpositive(z - m);
        store(tile.z + c * tile.lanes + lane, e), part += gap_terms<A>(e, m, z);
      }
      sum += part;
    }
    store(s.gap_sum + lane, sum), store(s.gap_max + lane, max);
  }
}

// sums[lane] += value(offset in the tile, lane) of each of the n classes of a tile; value takes and returns a vector of lanes.
template <class A, class Value>
INLINE void add_classes(A* sums, const Tile<A>& tile, int64_t n, const Value& value) {
  for (int lane = 0; lane < tile.lanes; lane += Simd<A>::W) {
    Vector<A> sum = load(sums + lane);
    for (int64_t flush = 0; flush < n; flush += kFlush) {
      Vector<A> part{};
      for (int64_t c = flush; c < n && c < flush + kFlush; ++c) part += value(c * tile.lanes + lane, lane);
      sum += part;
    }
    store(sums + lane, sum);
  }
}

// Adds the classes of a tile, each with its a_c, to smooth_sum and weight_total.
template <class A>
void add_weighted_classes(const Tile<A>& tile, int64_t n, GroupState<A>& s) {
  using V = Vector<A>;
  for (int lane = 0; lane < tile.lanes; lane += Simd<A>::W) {
    const V shift = load(s.shift + lane);
    V sum = load(s.smooth_sum + lane), total = load(s.weight_total + lane);
    for (int64_t flush = 0; flush < n; flush += kFlush) {
      V part{}, total_part{};
      for (int64_t c = flush; c < n && c < flush + kFlush; ++c) {
        const V a = load(tile.a + c * tile.lanes + lane);
        part += a * (shift - V(load(tile.z + c * tile.lanes + lane))), total_part += a;
      }
      sum += part, total += total_part;
    }
    store(s.smooth_sum + lane, sum), store(s.weight_total + lane, total);
  }
}

// Adds classes [start, start + n) to the statistics of all lanes; leaves exp(x - m so far) in the tile, 0 at the target.
template <class A>
void tile_stats(const Terms<A>& terms, Tile<A>& tile, int64_t start, int64_t n, GroupState<A>& s) {
  using V = Vector<A>;
  for (int lane = 0; lane < tile.lanes; lane += Simd<A>::W) {
    const V before = load(s.max + lane);
    V m = before;
    for (int64_t c = 0; c < n; ++c) m = max_(V(load(tile.z + c * tile.lanes + lane)), m);
    const V finite = finite_max_vector<A>(m);
    if (start == 0) store(s.shift + lane, finite);
    store(s.max + lane, m), store(s.rest + lane, V(load(s.rest + lane)) * exp_nonpositive(before - finite));
  }
  auto difference = [&](int64_t at, int lane) { return V(load(s.shift + lane)) - V(load(tile.z + at)); };
  if (terms.uniform) add_classes(s.smooth_sum, tile, n, difference);
  if (terms.per_class) {
    add_weighted_classes(tile, n, s);
  }
  for (int lane = 0; lane < tile.lanes && !terms.soft; ++lane) {
    if (terms.two_labels && tile.has(s.target_b[lane], start, n)) s.x_b[lane] = tile.at(s.target_b[lane] - start, lane);
    if (!tile.has(s.target[lane], start, n)) continue;
    A& z_t = tile.at(s.target[lane] - start, lane);
    s.x_t[lane] = z_t, z_t = -kInfinity<A>;
  }
  if (!terms.entropy) return exp_tile_with_sums(tile, n, s);
  exp_tile_with_gaps(tile, n, s);
  add_classes(s.rest, tile, n, [&](int64_t at, int) { return V(load(tile.z + at)); });
}

// tile.z = the gradient of classes [start, start + n), from exp(x - m); a lane that is not live gets its at_t everywhere.
template <class A>
void tile_gradient(const Terms<A>& terms, Tile<A>& tile, int64_t start, int64_t n, const GroupState<A>& s) {
  using V = Vector<A>;
  for (int lane = 0; lane < tile.lanes; lane += Simd<A>::W) {
    const V p = load(s.p + lane), constant = load(s.constant + lane), smooth = load(s.smooth + lane), dead = load(s.at_t + lane);
    const auto live = V(load(s.live + lane)) != V{};
    for (int64_t at = lane; at < n * tile.lanes; at += tile.lanes) {
      V d = V(load(tile.z + at)) * p - constant;
      if (terms.per_class) d -= V(load(tile.a + at)) * smooth;
      if (terms.capped) d *= V(load(tile.dz + at));
      store(tile.z + at, live ? d : dead);  // 0 times an infinite or NaN statistic would be NaN
    }
  }
  for (int lane = 0; lane < tile.lanes && !terms.soft; ++lane) {  // a lane that is not live has no target
    if (tile.has(s.target[lane], start, n)) tile.at(s.target[lane] - start, lane) = s.at_t[lane];
    if (terms.two_labels && tile.has(s.target_b[lane], start, n)) tile.at(s.target_b[lane] - start, lane) = s.at_b[lane];
  }
}

// The gradients of a group. has_exp: all its classes are in the tile, as exponentials, and their a_c.
template <class T, class A>
void lane_gradients(const Problem& problem, const Terms<A>& terms, Tile<A>& tile, const GroupPointers<T, A>& at, int n_lanes,
                    bool has_exp, const GroupState<A>& s) {
  const Strides& to = problem.dlogits_strides;
  for (int64_t start = 0; start < problem.n_cols; start += tile.cols) {
    const int64_t n = problem.n_cols - start < tile.cols ? problem.n_cols - start : tile.cols;
    if (!has_exp) {
      load_logits(problem, terms, tile, at.x, n_lanes, start, n);
      if (terms.per_class) load_tile_weights(problem, terms, tile, at, n_lanes, start, n);
      exp_tile(tile, n, s);
    }
    tile_gradient(terms, tile, start, n, s);
    store_tile<T, A>(at.dx + start * to.col, tile.z, tile.lanes, to.row, to.col, n_lanes, n);
  }
}

template <class A>
INLINE int64_t lanes_per_group(const Problem& problem) {
  const int64_t lanes = kTileInL1 / problem.n_cols / Simd<A>::W * Simd<A>::W;
  return lanes < kWideLanes ? kWideLanes : lanes > kMaxLanes ? kMaxLanes : lanes;
}

template <class A>
INLINE void shape_tile(Tile<A>& tile, int n_lanes) {
  tile.lanes = int(padded<A>(n_lanes)), tile.cols = kTile / tile.lanes;
}

template <class T>
RowSums forward_lanes(const Problem& problem, int64_t begin, int64_t end, double coefficient, double weight_total) {
  using A = typename Accumulate<T>::type;
  const Terms<A> terms(problem, weight_total);
  Tile<A>& tile = thread_scratch_as<Tile<A>>();
  GroupState<A>& s = tile.state;
  GroupSums<A> sums;
  for_groups(problem, begin, end, lanes_per_group<A>(problem), [&](int64_t row, int n_lanes) {
    const GroupPointers<T, A> at(problem, row);
    shape_tile(tile, n_lanes);
    s.begin_forward(problem, terms, row, n_lanes, tile.lanes, A(coefficient));
    for (int64_t start = 0; start < problem.n_cols; start += tile.cols) {
      const int64_t n = problem.n_cols - start < tile.cols ? problem.n_cols - start : tile.cols;
      load_logits(problem, terms, tile, at.x, n_lanes, start, n);
      if (terms.per_class) load_tile_weights(problem, terms, tile, at, n_lanes, start, n);
      tile_stats(terms, tile, start, n, s);
    }
    s.finish_forward(problem, terms, row, n_lanes, sums);
    if (!problem.dlogits) return;
    s.factors(terms, tile.lanes);
    lane_gradients<T, A>(problem, terms, tile, at, n_lanes, problem.n_cols <= tile.cols, s);
  });
  return sums.total();
}

template <class T>
void backward_lanes(const Problem& problem, int64_t begin, int64_t end) {
  using A = typename Accumulate<T>::type;
  const Terms<A> terms(problem, static_cast<const A*>(problem.saved)[3]);
  Tile<A>& tile = thread_scratch_as<Tile<A>>();
  GroupState<A>& s = tile.state;
  for_groups(problem, begin, end, lanes_per_group<A>(problem), [&](int64_t row, int n_lanes) {
    const GroupPointers<T, A> at(problem, row);
    shape_tile(tile, n_lanes);
    s.begin_backward(problem, terms, at.x, row, n_lanes, tile.lanes);
    s.factors(terms, tile.lanes);
    lane_gradients<T, A>(problem, terms, tile, at, n_lanes, false, s);
  });
}

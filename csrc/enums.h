// Constants that two languages share. python.cpp exports those that Python and Triton repeat, and a test compares them.
#pragma once

#include <cstdint>

namespace udi {

// How the losses of the rows become one.
enum Reduction : int64_t { kNone, kSum, kMean };

enum class DType : int { kFloat, kDouble, kBFloat16, kHalf };

// Rows of the statistics that a forward kernel keeps for the backward kernel of the same backend:

namespace js_div_stats {
// Maxima and inverse sums of exponentials, KL(q||m) and KL(p||m); at beta = 0 the last are the sums of q - p, which
// rounding leaves, and of p log(p/q). For KL(r||m) alone, the sums of r D and s u; see cpu/js_div.h. For a weighted
// mean, one more: each row's weight over the sum of the weights.
enum Stat { kMaxQ, kInvQ, kMaxP, kInvP, kDivQ, kDivP, kStats, kShare = kStats };
}  // namespace js_div_stats

// What classes hold that a teacher's top K leave out.
enum Tail : int64_t { kRenormalize, kBucket, kZero };

namespace js_div_topk_stats {
// The student's maximum and inverse sum of exponentials, the logarithm of what the teacher's probabilities are divided
// by, the sum of u, and u/q less that sum in the classes left out; see cpu/js_div_topk.cpp. For a weighted mean, one
// more: each row's weight over the sum of the weights.
enum Stat { kMax, kInv, kLogSum, kMean, kSlope, kStats, kShare = kStats };
}  // namespace js_div_topk_stats

namespace club_stats {
// Means over the rows; all but the first are of the data less the shift.
enum Stat { kShift, kMeanY, kVarY, kMeanW, kMeanWMu, kStats };
constexpr int64_t kSmallClass = 48;  // on a CPU, a class of up to this many rows has no statistics
}  // namespace club_stats

namespace duc_stats {
// The largest z of the negatives, 1/sum_j e^((z_ij - that)/T), and 1 - p_ii.
enum Stat { kMax, kInvSum, kOthers, kStats };
}  // namespace duc_stats

}  // namespace udi

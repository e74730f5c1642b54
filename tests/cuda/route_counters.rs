//! What routers cost whose tokens are coupled, or that are not a plain top-k, and the losses: 512 tokens, 64 experts, top 2. Sectors are
//! those of whole rows wherever a kernel reads or writes rows; instructions are recorded, so that they do not grow unseen; no bank
//! conflicts, but where a datum names the bank.

use crate::common::simulator::Simulator;
use crate::common::{Layout, RouteCase};
use crate::staged;
use gatefold::spec::{
    AuxLoss, Capacity, CapacityLimit, CapacityOrder, ExpertGroups, GroupScore, Renormalize, Router, Score,
    SecondExpert, Selection,
};
use simt::Counters;

/// Tokens and experts.
const N: u64 = 512;
const E: u64 = 64;
/// Sectors of the logits, and of as many f64.
const LOGITS: u64 = N * E * 4 / 32;
const WIDE: u64 = 2 * LOGITS;

/// What the kernels of one call counted, in order.
struct Counted(Vec<(&'static str, Counters)>);

impl Counted {
    fn new(edit: impl FnOnce(&mut Router)) -> Self {
        let mut spec = Router::new(E as usize, 2);
        edit(&mut spec);
        Counted::of_case(RouteCase::new(&spec, N as usize, 1))
    }

    fn of_case(mut case: RouteCase) -> Self {
        case.layout = Layout::Contiguous;
        case.logits = case.logits.with_layout(Layout::Contiguous);
        let simulator = Simulator::new(false);
        case.run(|spec, input, output| staged::route(&simulator, spec, input, output));
        Counted(simulator.take_counters())
    }

    /// Of a kernel's launch number `i`.
    #[track_caller]
    fn nth(&self, entry: &str, i: usize) -> Counters {
        let entry = format!("gatefold_{entry}");
        self.0.iter().filter(|(name, _)| *name == entry).nth(i).unwrap_or_else(|| panic!("{entry}, launch {i}")).1
    }

    /// Instructions and sectors of a kernel's first launch, which has no bank conflicts.
    #[track_caller]
    fn of(&self, entry: &str) -> (u64, u64) {
        let counters = self.nth(entry, 0);
        assert!(counters.conflict_degree() <= 1.0, "{entry}: bank conflicts of {}", counters.conflict_degree());
        (counters.instructions, counters.global_sectors)
    }
}

/// Each token by itself: its logits once per pass, and once more the chosen ones, each in a sector; ids, weights and a count.
#[test]
fn prototypes_and_sparse_mixer() {
    let prototypes = Counted::new(|r| r.selection = Selection::Prototypes);
    assert_eq!(prototypes.of("route_prototypes_f32"), (N * 417, 3 * LOGITS + N * (2 + 2 + 2)));
    let mixer = Counted::new(|r| r.selection = Selection::SparseMixer { jitter_eps: 0.1 });
    let (instructions, sectors) = mixer.of("route_sparse_mixer_f32");
    assert_eq!(instructions, N * 451);
    assert!(sectors <= 4 * LOGITS + N * (2 + 2 + 2), "{sectors}"); // two of the chosen may share a sector
    assert_eq!(prototypes.of("route_clear_f64"), (66, E * 4 / 32 + 1));
}

/// DeepSeek-V3: scores and groups by way of shared memory. The logits once, the bias once, the chosen logits again.
#[test]
fn groups_of_deepseek_v3() {
    let mut spec = Router::new(256, 8);
    (spec.score, spec.renormalize) = (Score::Sigmoid, Renormalize::sum());
    spec.groups = Some(ExpertGroups::new(8, 4, GroupScore::Top2Sum));
    let counted = Counted::of_case(RouteCase::new(&spec, 64, 1).with_bias());
    let c = counted.nth("route_e256", 0);
    assert_eq!(c.instructions, 123_136);
    assert!(c.global_sectors <= 64 * (2 * 256 / 8 + 8 + 1 + 1 + 8), "{}", c.global_sectors);
    // A group's value lies at its first key, and groups of 32 lie in the same bank: written by 8 lanes once and read once.
    assert_eq!(c.shared_wavefronts - c.shared_ideal_wavefronts, 64 * 2 * 7);
}

/// Two passes over the logits; chunks of 8 tokens, of which each leaves two rows of sums that begin anywhere, and two totals.
#[test]
fn losses() {
    let z = Counted::new(|_| {});
    assert_eq!(z.of("route_losses_e64"), (118_976, 2 * LOGITS + N / 8 * 2));
    assert_eq!(z.of("route_losses_groups_f64"), (4573, N / 8 * 8 * 2 + 3)); // every warp reads the totals
    assert_eq!(z.of("route_losses_total_f64"), (146, 4));
    let both = Counted::new(|r| r.aux_loss = Some(AuxLoss::TopK));
    assert_eq!(both.of("route_losses_e64"), (161_472, 2 * LOGITS + N / 8 * 36));
    assert_eq!(both.of("route_losses_groups_f64"), (5789, N / 8 * 8 * 2 + 3 + N / 8 * 34));
}

#[test]
fn sinkhorn() {
    let counted = Counted::new(|r| r.selection = Selection::Sinkhorn { iterations: 2 });
    // Two passes over the logits; the exponentials; ones for the columns; the number of tokens.
    assert_eq!(counted.of("route_sinkhorn_exp_f64"), (80_584, 2 * LOGITS + WIDE + E * 8 / 32 + 1));
    // A lane a row, whose sum must ascend: an element a sector, which the cache holds for the next three. Columns are the same for all lanes.
    assert_eq!(counted.of("route_sinkhorn_rows_f64"), (8928, N * E + N / 32 * (E + 1 + 32 * 8 / 32)));
    // A lane a column: whole sectors. Rows are the same for all lanes.
    assert_eq!(counted.of("route_sinkhorn_columns_f64"), (16_816, WIDE + E / 32 * N + E * 8 / 32));
    assert_eq!(counted.of("route_sinkhorn_values_f64"), (32_256, WIDE + LOGITS + N * (E * 8 / 32 + 1)));
    // All values compared in place of logits, besides the two passes of the softmax.
    let (instructions, sectors) = counted.of("route_e64");
    assert_eq!(instructions, 190_976);
    assert!(sectors <= 3 * LOGITS + N * (2 + 2 + 2), "{sectors}");
}

#[test]
fn queues() {
    let capacity = |order: CapacityOrder| {
        Counted::new(move |r| {
            let mut capacity = Capacity::new(CapacityLimit::Factor(1.0));
            capacity.order = order;
            r.capacity = Some(capacity);
        })
    };
    let by_position = capacity(CapacityOrder::Position);
    let queue = by_position.nth("route_queue_u32", 0);
    // Ids of 4 tokens to a sector, read slot by slot; a sector for each that is dropped, few here.
    assert_eq!(queue.instructions, 7086);
    assert!(queue.global_sectors <= 2 * (N / 4) + N / 5, "{}", queue.global_sectors);
    assert!(queue.conflict_degree() < 1.2, "experts name the bank: {}", queue.conflict_degree());
    let (instructions, sectors) = by_position.of("route_weights_f64");
    assert_eq!(instructions, N * 83);
    assert!(sectors <= N * (1 + 1 + 1 + 2), "{sectors}"); // scores, ids, weights, at most two counts

    let by_score = capacity(CapacityOrder::Score);
    assert_eq!(by_score.of("route_largest_f32"), (91_648, 2 * LOGITS + N));
    // Digits of the keys as they lie; from then on in the order so far, a sector for each key.
    let digits = [0, 1, 2, 3].map(|i| by_score.nth("route_digits_u32", i));
    assert_eq!(digits.map(|c| c.instructions), [800, 800, 800, 384]);
    assert_eq!(digits[0].global_sectors, 3 * N / 8);
    assert!(digits[1..].iter().all(|c| c.global_sectors <= 2 * N + 2 * N / 8), "{digits:?}");
    assert_eq!(by_score.nth("group_tokens_u32", 0).instructions, 15_744);
    assert_eq!(by_score.nth("route_queue_u32", 0).instructions, 7086);
}

#[test]
fn second_experts_by_chance() {
    let counted = Counted::new(|r| {
        (r.second_expert, r.renormalize) = (SecondExpert::Random, Renormalize::sum());
    });
    let (instructions, sectors) = counted.of("route_weights_f64");
    assert_eq!(instructions, N * 290);
    assert!(sectors <= N * (1 + 1 + 1 + 1 + 2), "{sectors}"); // besides scores, weights and counts: ids, read and written
}

#[test]
fn expert_choice() {
    let counted = Counted::new(|r| {
        (r.selection, r.capacity) = (Selection::ExpertChoice, Some(Capacity::new(CapacityLimit::Factor(1.0))));
    });
    // By expert: a sector for each key.
    assert_eq!(counted.of("route_choice_keys_f32"), (169_472, 3 * LOGITS + N * E));
    let digits = [0, 1, 2, 3, 4].map(|i| counted.nth("route_digits_u32", i));
    assert_eq!(digits.map(|c| c.instructions), [51_200, 51_200, 51_200, 38_912, 24_576]);
    assert_eq!(digits[0].global_sectors, 3 * LOGITS);
    assert!(digits[1..].iter().all(|c| c.global_sectors <= 2 * N * E + 3 * LOGITS), "{digits:?}");
    // 8 tiles of 4096 keys, 2048 digits: ids once, counts once; then counts read twice and written, and their sums.
    let counts = 8 * 2048 * 4 / 32;
    let count = counted.nth("group_count_u32", 0);
    assert_eq!((count.instructions, count.global_sectors), (32_384, LOGITS + counts));
    assert_eq!(counted.of("group_scan_u32"), (651_264, 3 * counts + 2048 * 4 / 32));
    let mark = counted.nth("route_choice_mark_u32", 0);
    assert_eq!(mark.instructions, 44_032);
    assert!(mark.global_sectors <= 2 * N * E, "{}", mark.global_sectors);
    let (instructions, sectors) = counted.of("route_choice_weights_f64");
    assert_eq!(instructions, 200_192);
    // Three passes over the logits; marks, ids and weights; a sector for each count, two per token.
    assert!(sectors <= 3 * LOGITS + N * (E + 4 * E + 4 * E) / 32 + 2 * N, "{sectors}");
}

//! What routing is held to, on any backend: ids to the bit, weights to the last bit of f32; and the cases that ask for it.

use super::buffer::{Array, Layout, Output};
use super::data::Rng;
use super::moe_case::{RouteCase, RouteResult};
use super::pairs::{self, Pairs};
use super::sums::{assert_sums, naive_sum, starts_for};
use super::tolerance::ulp;
use gatefold::spec::{
    AuxLoss, Capacity, CapacityLimit, CapacityOrder, ExpertGroups, GroupScore, Renormalize, Router, Score,
    SecondExpert, SelectOn, Selection,
};
use gatefold::{Dtype, Element, Result as Outcome, View, ViewMut, reference};

/// Everything that is an integer is equal; weights are the truth rounded once, give or take the last bit; losses are within a few.
///
/// Where the truth is NaN or infinite in f32 (such a logit, or a division by 0), a weight may be anything.
pub fn check_route(who: &str, case: &RouteCase, got: &RouteResult<f32>) -> Result<(), String> {
    let truth = case.run(reference::route);
    let what = format!("{who}: {:?}", case.spec);
    let same =
        |name: &str, same: bool, found: String| if same { Ok(()) } else { Err(format!("{name}: {found}; {what}")) };
    same("ids", got.ids == truth.ids, format!("{:?}, expected {:?}", got.ids, truth.ids))?;
    let (found, counts) = (&got.tokens_per_expert, &truth.tokens_per_expert);
    same("tokens_per_expert", found == counts, format!("{found:?}, expected {counts:?}"))?;
    same("dropped", got.dropped == truth.dropped, format!("{}, expected {}", got.dropped, truth.dropped))?;
    let (found, tokens) = (&got.expert_tokens, &truth.expert_tokens);
    same("expert_tokens", found == tokens, format!("{found:?}, expected {tokens:?}"))?;
    for (i, (got, truth)) in got.weights.iter().zip(&truth.weights).enumerate() {
        let close = (f64::from(*got) - truth).abs() <= 0.51 * ulp(Dtype::F32, *truth);
        let fine = !(*truth as f32).is_finite() || close;
        same(&format!("weight {i}"), fine, format!("{got:e}, expected {truth:e}"))?;
    }
    for (name, got, truth) in [("aux_loss", got.aux_loss, truth.aux_loss), ("z_loss", got.z_loss, truth.z_loss)] {
        let close = got == truth as f32 || (f64::from(got) - truth).abs() <= 0.51 * ulp(Dtype::F32, truth);
        same(name, close || (truth.is_nan() && got.is_nan()), format!("{got:e}, expected {truth:e}"))?;
    }
    Ok(())
}

/// Whether the selection has a bias.
pub fn takes_bias(spec: &Router) -> bool {
    matches!(spec.selection, Selection::TopK | Selection::Prototypes)
}

/// Infinite, NaN, equal and very large logits, in four kinds.
pub fn awkward_logits(rng: &mut Rng, len: usize, kind: usize) -> Vec<f32> {
    let awkward = [
        f32::INFINITY,
        f32::NEG_INFINITY,
        f32::NAN,
        0.0,
        -0.0,
        1e-45,
        -1e-45,
        f32::MAX,
        f32::MIN,
        1.0,
        -1.0,
        700.0,
        -800.0,
        88.0,
        -104.0,
    ];
    (0..len)
        .map(|_| match kind {
            0 => *rng.pick(&awkward),
            1 if rng.chance(0.9) => rng.normal() as f32,
            1 => *rng.pick(&awkward[..3]),
            2 => *rng.pick(&[1.0, 1.0 + f32::EPSILON, 1.0 - f32::EPSILON]),
            _ => (rng.normal() * 40.0) as f32,
        })
        .collect()
}

/// A table over all options of 24 experts in which every pair of values occurs, as (router, bias, masks).
pub fn option_table(seed: u64, keep: impl Fn(&Router) -> bool) -> (Vec<(Router, bool, bool)>, Pairs) {
    let scores = [Score::Softmax, Score::Sigmoid, Score::SqrtSoftplus, Score::Raw];
    let selections = [
        Selection::TopK,
        Selection::ExpertChoice,
        Selection::Sinkhorn { iterations: 2 },
        Selection::SparseMixer { jitter_eps: 0.1 },
        Selection::Prototypes,
    ];
    let rules = [
        Renormalize::None,
        Renormalize::sum(),
        Renormalize::Sum { eps: 1e-20, floor: 0.25 },
        Renormalize::L2,
        Renormalize::Softmax,
    ];
    let build = |row: &[usize]| -> (Router, bool, bool) {
        let mut r = Router::new(24, [1, 2, 4, 8, 12][row[0]]);
        r.score = scores[row[1]];
        r.select_on = [SelectOn::Scores, SelectOn::Logits][row[2]];
        r.groups = [None, Some(GroupScore::Max), Some(GroupScore::Top2Sum)][row[3]].map(|s| ExpertGroups::new(4, 2, s));
        r.selection = selections[row[4]];
        r.renormalize = rules[row[5]];
        r.scaling_factor = [1.0, 2.5][row[6]];
        r.capacity = [None, Some(CapacityLimit::Tokens(3)), Some(CapacityLimit::Factor(1.25))][row[7]].map(|limit| {
            let mut c = Capacity::new(limit);
            c.order = [CapacityOrder::Position, CapacityOrder::Score][row[8]];
            c.group_len = [None, Some(7)][row[9]];
            c.normalize_after_drop = row[10] == 1;
            c
        });
        r.second_expert = [SecondExpert::Always, SecondExpert::Random][row[11]];
        r.aux_loss = [None, Some(AuxLoss::TopK), Some(AuxLoss::Switch { group_len: Some(5) })][row[12]];
        (r, row[13] == 1, row[14] == 1)
    };
    let sizes = [5, 4, 2, 3, 5, 5, 2, 3, 2, 2, 2, 2, 3, 2, 2];
    let table = pairs::pairwise(&sizes, seed, |row| {
        let (router, bias, _) = build(row);
        // Without a capacity its options are not options.
        let no_capacity_options = row[7] > 0 || row[8..11].iter().all(|v| *v == 0);
        router.validate().is_ok() && (!bias || takes_bias(&router)) && no_capacity_options && keep(&router)
    });
    (table.rows.iter().map(|row| build(row)).collect(), table)
}

/// A call of `router_logits`.
pub struct LogitsCase<T, W> {
    pub spec: Router,
    pub hidden: Array<T, 2>,
    pub weight: Array<W, 2>,
    pub bias: Option<Vec<f32>>,
    pub seed: u64,
    pub layout: Layout,
}

impl<T: Element, W: Element> LogitsCase<T, W> {
    /// Hidden states of deviation 1 with awkward numbers between, weights of deviation 0.3, a bias in every other case.
    pub fn new(n: usize, hidden: usize, experts: usize, jitter: Option<f64>, layout: Layout, seed: u64) -> Self {
        let mut rng = Rng::new(seed);
        let mut spec = Router::new(experts, 1);
        spec.jitter = jitter;
        let mut x = rng.normals::<T>(n * hidden, 1.0);
        rng.sprinkle(&mut x);
        let hidden = Array::new([n, hidden], layout, &x);
        let weight = Array::new([experts, hidden.shape()[1]], layout, &rng.normals(experts * hidden.shape()[1], 0.3));
        let bias = rng.chance(0.5).then(|| rng.normals(experts, 1.0));
        LogitsCase { spec, hidden, weight, bias, seed, layout }
    }

    /// Runs it between guard values.
    pub fn run<O: Element>(
        &self,
        logits: impl FnOnce(&Router, View<'_, T, 2>, View<'_, W, 2>, Option<&[f32]>, u64, ViewMut<'_, O, 2>) -> Outcome<()>,
    ) -> Vec<O> {
        let mut out = Output::new([self.hidden.shape()[0], self.spec.num_experts], self.layout);
        let (hidden, weight) = (self.hidden.view(), self.weight.view());
        logits(&self.spec, hidden, weight, self.bias.as_deref(), self.seed, out.view()).unwrap();
        out.finish("logits")
    }

    /// Compares logits with the reference, by the error of the naive method.
    #[track_caller]
    pub fn check(&self, who: &str, got: &[f32]) {
        let ([n, width], experts) = (self.hidden.shape(), self.spec.num_experts);
        let truth = self.run(reference::router_logits);
        let jitter = self.spec.jitter.unwrap_or(0.0) as f32;
        let x: Vec<f32> = (0..n * width)
            .map(|i| {
                let (t, d) = (i / width, i % width);
                let u = gatefold::random::uniform(self.seed, t as u64, d as u64);
                self.hidden.at([t, d]).to_f32() * (1.0 + jitter * (2.0 * u - 1.0))
            })
            .collect();
        let naive: Vec<f32> = (0..n * experts)
            .map(|i| {
                let (t, e) = (i / experts, i % experts);
                let terms: Vec<f32> = (0..width).map(|d| x[t * width + d] * self.weight.at([e, d]).to_f32()).collect();
                naive_sum(&terms, self.bias.as_ref().map_or(0.0, |b| b[e]), truth[i], starts_for(n * experts))
            })
            .collect();
        let what = format!("{who}: {n} x {width} x {experts}, {} times {}, {:?}", T::DTYPE, W::DTYPE, self.spec.jitter);
        assert_sums(&what, got, &truth, &naive, experts);
    }
}

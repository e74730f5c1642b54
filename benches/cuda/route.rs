//! `routing`: from logits to sorted rows, that is experts, weights, and the order in which the experts take the tokens.

use crate::case::{Case, Job, Twin, mixture, random, samples};
use crate::support::array::Array;
use crate::support::folder::Folder;
use gatefold::cuda::{Device, GroupTokens, GroupTokensOutput, Queue, RouteInput, RouteOutput, group_tokens, route};
use gatefold::spec::Moe;
use gatefold::{Dtype, Result, args, reference};

/// Largest error of a weight, which is at most 1: a rounding of f32 for each of score, sum, quotient, scale.
const TOLERANCE: f64 = 4.0 * f32::EPSILON as f64;

pub fn cases(cases: &mut Vec<Case>) {
    for tokens in [1, 64, 512, 4096, 16384] {
        cases.push(Case {
            name: format!("routing/qwen3-30b-a3b/{tokens}/f32"),
            kind: "routing",
            dtype: Dtype::F32,
            flops: 0.0,
            make: Box::new(move |device| Ok(Box::new(Routes::new(device, mixture("qwen3-30b-a3b"), tokens)?))),
        });
    }
}

struct Routes {
    queue: Queue<'static>,
    spec: Moe,
    group: GroupTokens,
    logits: Twin<f32>,
    ids: Twin<i32>,
    weights: Twin<f32>,
    expert_offsets: Twin<u32>,
    row_token: Twin<u32>,
    row_weight: Twin<f32>,
    position: Twin<u32>,
    tile_counts: Twin<u32>,
    tiles: Twin<u32>,
}

impl Routes {
    fn new(device: &'static Device, spec: Moe, tokens: usize) -> Result<Self> {
        let (experts, slots) = (spec.router.num_experts, spec.router.slots());
        let group = GroupTokens::new(&spec.experts, tokens, slots);
        Ok(Routes {
            queue: Queue::new(device),
            logits: Twin::new(device, random(1, &[tokens, experts], 1.0))?,
            ids: Twin::zeros(device, &[tokens, slots])?,
            weights: Twin::zeros(device, &[tokens, slots])?,
            expert_offsets: Twin::zeros(device, &[experts + 1])?,
            row_token: Twin::zeros(device, &[tokens * slots])?,
            row_weight: Twin::zeros(device, &[tokens * slots])?,
            position: Twin::zeros(device, &[tokens, slots])?,
            tile_counts: Twin::zeros(device, &[4])?,
            tiles: Twin::zeros(device, &[4, group.max_tiles(), 4])?,
            group,
            spec,
        })
    }
}

impl Job for Routes {
    fn call(&mut self) -> Result<()> {
        let (tokens, slots, experts) = (self.group.num_tokens, self.group.slots, self.spec.router.num_experts);
        let output = RouteOutput::new(self.ids.view_mut([tokens, slots]), self.weights.view_mut([tokens, slots]));
        let logits = self.logits.view([tokens, experts]);
        route(&mut self.queue, &self.spec.router, &RouteInput::new(logits), output)?;
        let output = GroupTokensOutput::new(
            self.expert_offsets.view_mut([experts + 1]),
            self.row_token.view_mut([tokens * slots]),
            self.row_weight.view_mut([tokens * slots]),
            self.position.view_mut([tokens, slots]),
            self.tile_counts.view_mut([4]),
            self.tiles.view_mut([4, self.group.max_tiles(), 4]),
        );
        let (ids, weights) = (self.ids.view([tokens, slots]), self.weights.view([tokens, slots]));
        group_tokens(&mut self.queue, &self.spec.experts, ids, weights, output)
    }

    fn check(&mut self) -> std::result::Result<(), String> {
        let text = |error: gatefold::Error| error.to_string();
        self.call().map_err(text)?;
        self.ids.fetch().map_err(text)?;
        self.weights.fetch().map_err(text)?;
        let rows = samples(self.group.num_tokens);
        let shape = [rows.len(), self.group.slots];
        let mut ids = Array::new(vec![0; shape[0] * shape[1]], &shape);
        let mut truth = Array::<f64>::zeros(&shape);
        let output = args::RouteOutput::new(ids.view_mut(), truth.view_mut());
        let logits = self.logits.host.pick(&rows);
        reference::route(&self.spec.router, &args::RouteInput::new(logits.view()), output).map_err(text)?;
        if self.ids.host.pick(&rows) != ids {
            return Err("other experts than the reference's".into());
        }
        let error = |(x, y): (&f32, &f64)| (f64::from(*x) - y).abs();
        let worst = self.weights.host.pick(&rows).data.iter().zip(&truth.data).map(error).fold(0.0, f64::max);
        // The order that the experts take the tokens in: by expert, then by token.
        self.row_token.fetch().map_err(text)?;
        let slots = self.group.slots;
        let mut order: Vec<(i32, usize)> =
            self.ids.host.data.iter().enumerate().map(|(assignment, id)| (*id, assignment)).collect();
        order.sort_unstable();
        let sorted = order.iter().map(|(_, assignment)| (assignment / slots) as u32);
        if !sorted.eq(self.row_token.host.data.iter().copied()) {
            return Err("rows in another order than by expert and token".into());
        }
        if worst <= TOLERANCE { Ok(()) } else { Err(format!("a weight is wrong by {worst:.1e}")) }
    }

    fn write(&mut self, folder: &mut Folder) -> std::io::Result<()> {
        folder.array("logits", &self.logits.host)?;
        folder.array("out", &self.weights.host)?;
        folder.ids("ids", &self.ids.host)
    }

    fn bytes(&self) -> f64 {
        let (logits, slots) = (self.logits.host.data.len(), self.ids.host.data.len());
        (4 * logits + (8 + 4 + 4 + 4) * slots) as f64
    }
}

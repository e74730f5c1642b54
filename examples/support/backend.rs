//! One trait over the ways to compute: the reference in f64, the CPU backend in any type, the naive method of the numerical
//! contract. A layer (`layer.rs`) is written once against it.

use super::array::{Array, cast};
use gatefold::args::{
    AttentionInput, AttentionOutput, ExpertWeights, FfnWeights, KvCache, KvCacheMut, MoeInput, MoeOutput, MoeWeights,
    QkvInput, QkvOutput, RopeTable, RouteInput, RouteOutput, Routing, WkvInput, WkvOutput,
};
use gatefold::cpu::Float;
use gatefold::spec::{Attention, ExpertFfn, Ffn, Mla, Moe, Norm, QkvPrep, Rope, Router};
use gatefold::{Element, Result, View, ViewMut, reference};
use rayon::prelude::*;

/// Weights of a mixture as host arrays: matrices of type `W`, small vectors in f64.
#[derive(Clone, Debug, Default)]
pub struct MoeArrays<W> {
    pub router: Array<W>,
    pub router_bias: Option<Vec<f64>>,
    pub selection_bias: Option<Vec<f64>>,
    pub experts: FfnArrays<W>,
    pub shared: Option<FfnArrays<W>>,
    pub shared_gate: Option<Array<W>>,
}

/// Weights of one block `[out, in]`, or of all experts `[num_experts, out, in]`.
#[derive(Clone, Debug, Default)]
pub struct FfnArrays<W> {
    pub gate: Option<Array<W>>,
    pub up: Array<W>,
    pub down: Array<W>,
    pub gate_bias: Option<Array<f64>>,
    pub up_bias: Option<Array<f64>>,
    pub down_bias: Option<Array<f64>>,
}

/// Small vectors of a block in the type that a backend takes.
#[derive(Default)]
pub struct FfnBiases<S> {
    pub gate: Option<Array<S>>,
    pub up: Option<Array<S>>,
    pub down: Option<Array<S>>,
}

impl<W: Element> FfnArrays<W> {
    pub fn biases<S: Element>(&self) -> FfnBiases<S> {
        let cast = |b: &Option<Array<f64>>| b.as_ref().map(Array::cast);
        FfnBiases { gate: cast(&self.gate_bias), up: cast(&self.up_bias), down: cast(&self.down_bias) }
    }

    /// As the argument of a function on one block.
    pub fn block<'a, S: Element>(&'a self, biases: &'a FfnBiases<S>) -> FfnWeights<'a, W, S> {
        let slice = |b: &'a Option<Array<S>>| b.as_ref().map(|b| &b.data[..]);
        let mut weights = FfnWeights::new(self.gate.as_ref().map(Array::view), self.up.view(), self.down.view());
        weights.gate_bias = slice(&biases.gate);
        weights.up_bias = slice(&biases.up);
        weights.down_bias = slice(&biases.down);
        weights
    }

    /// As the argument of a function on all experts.
    pub fn experts<'a, S: Element>(&'a self, biases: &'a FfnBiases<S>) -> ExpertWeights<'a, W, S> {
        let gate = self.gate.as_ref().map(Array::view);
        let mut weights = ExpertWeights::separate(gate, self.up.view(), self.down.view());
        weights.gate_bias = biases.gate.as_ref().map(Array::view);
        weights.up_bias = biases.up.as_ref().map(Array::view);
        weights.down_bias = biases.down.as_ref().map(Array::view);
        weights
    }

    pub fn cast<V: Element>(&self) -> FfnArrays<V> {
        FfnArrays {
            gate: self.gate.as_ref().map(Array::cast),
            up: self.up.cast(),
            down: self.down.cast(),
            gate_bias: self.gate_bias.clone(),
            up_bias: self.up_bias.clone(),
            down_bias: self.down_bias.clone(),
        }
    }
}

/// Small vectors of a mixture in the type that a backend takes.
pub struct MoeVectors<S> {
    pub router_bias: Option<Vec<S>>,
    pub selection_bias: Option<Vec<S>>,
    pub experts: FfnBiases<S>,
    pub shared: FfnBiases<S>,
}

impl<W: Element> MoeArrays<W> {
    pub fn vectors<S: Element>(&self) -> MoeVectors<S> {
        MoeVectors {
            router_bias: self.router_bias.as_deref().map(cast),
            selection_bias: self.selection_bias.as_deref().map(cast),
            experts: self.experts.biases(),
            shared: self.shared.as_ref().map(FfnArrays::biases).unwrap_or_default(),
        }
    }

    pub fn weights<'a, S: Element>(&'a self, vectors: &'a MoeVectors<S>) -> MoeWeights<'a, W, S> {
        let mut weights = MoeWeights::new(self.router.view(), self.experts.experts(&vectors.experts));
        weights.router_bias = vectors.router_bias.as_deref();
        weights.selection_bias = vectors.selection_bias.as_deref();
        weights.shared = self.shared.as_ref().map(|s| s.block(&vectors.shared));
        weights.shared_gate = self.shared_gate.as_ref().map(Array::view);
        weights
    }

    pub fn cast<V: Element>(&self) -> MoeArrays<V> {
        MoeArrays {
            router: self.router.cast(),
            router_bias: self.router_bias.clone(),
            selection_bias: self.selection_bias.clone(),
            experts: self.experts.cast(),
            shared: self.shared.as_ref().map(FfnArrays::cast),
            shared_gate: self.shared_gate.as_ref().map(Array::cast),
        }
    }
}

/// A way to compute. `A` is the type of activations, `S` that of logits, routing weights, `lse` and small vectors.
pub trait Backend {
    type A: Element;
    type S: Element;
    /// Weights as the backend keeps them; those that only read the host's borrow them.
    type Linear<'a>;
    type Mlp<'a>;
    type Moe<'a>;
    type Mla<'a>;

    /// The level or kernel that is really used.
    fn name(&self) -> String;

    fn pack_linear<'a, W: Float>(&mut self, weight: &'a Array<W>) -> Result<Self::Linear<'a>>;
    fn pack_mlp<'a, W: Float>(&mut self, spec: &Ffn, weights: &'a FfnArrays<W>) -> Result<Self::Mlp<'a>>;
    fn pack_moe<'a, W: Float>(&mut self, spec: &Moe, weights: &'a MoeArrays<W>) -> Result<Self::Moe<'a>>;
    fn pack_mla<'a, W: Float>(&mut self, spec: &Mla, kv_b: &'a Array<W>) -> Result<Self::Mla<'a>>;

    fn norm<const N: usize>(
        &mut self,
        spec: &Norm,
        x: View<'_, Self::A, N>,
        weight: Option<&[Self::S]>,
        bias: Option<&[Self::S]>,
        out: ViewMut<'_, Self::A, N>,
    ) -> Result<()>;
    fn linear(
        &mut self,
        x: View<'_, Self::A, 2>,
        weight: &Self::Linear<'_>,
        bias: Option<&[Self::S]>,
        out: ViewMut<'_, Self::A, 2>,
    ) -> Result<()>;
    fn prepare_qkv(
        &mut self,
        spec: &QkvPrep,
        input: &QkvInput<'_, Self::A, Self::S>,
        output: QkvOutput<'_, Self::A>,
    ) -> Result<()>;
    fn rope(
        &mut self,
        spec: &Rope,
        x: View<'_, Self::A, 3>,
        positions: &[u32],
        table: &RopeTable<'_, Self::S>,
        out: ViewMut<'_, Self::A, 3>,
    ) -> Result<()>;
    fn kv_append(&mut self, input: &KvCache<'_, Self::A>, cache: KvCacheMut<'_, Self::A>) -> Result<()>;
    fn attention(
        &mut self,
        spec: &Attention,
        input: &AttentionInput<'_, Self::A, Self::S>,
        output: AttentionOutput<'_, Self::A, Self::S>,
    ) -> Result<()>;
    fn mla_absorb_query(
        &mut self,
        spec: &Mla,
        q_nope: View<'_, Self::A, 3>,
        kv_b: &Self::Mla<'_>,
        out: ViewMut<'_, Self::A, 3>,
    ) -> Result<()>;
    fn mla_project_value(
        &mut self,
        spec: &Mla,
        latent: View<'_, Self::A, 3>,
        kv_b: &Self::Mla<'_>,
        out: ViewMut<'_, Self::A, 3>,
    ) -> Result<()>;
    fn sigmoid_mul(
        &mut self,
        x: View<'_, Self::A, 2>,
        gate: View<'_, Self::A, 2>,
        out: ViewMut<'_, Self::A, 2>,
    ) -> Result<()>;
    fn add(
        &mut self,
        x: View<'_, Self::A, 2>,
        y: View<'_, Self::A, 2>,
        multiplier: f64,
        out: ViewMut<'_, Self::A, 2>,
    ) -> Result<()>;
    fn mlp(
        &mut self,
        spec: &Ffn,
        x: View<'_, Self::A, 2>,
        weights: &Self::Mlp<'_>,
        out: ViewMut<'_, Self::A, 2>,
    ) -> Result<()>;
    fn router_logits(
        &mut self,
        spec: &Router,
        hidden: View<'_, Self::A, 2>,
        weights: &Self::Moe<'_>,
        logits: ViewMut<'_, Self::S, 2>,
    ) -> Result<()>;
    fn route(&mut self, spec: &Router, input: &RouteInput<'_, Self::S>, output: RouteOutput<'_, Self::S>)
    -> Result<()>;
    fn expert_ffn(
        &mut self,
        spec: &ExpertFfn,
        hidden: View<'_, Self::A, 2>,
        routing: &Routing<'_, Self::S>,
        weights: &Self::Moe<'_>,
        out: ViewMut<'_, Self::A, 2>,
    ) -> Result<()>;
    fn moe(
        &mut self,
        spec: &Moe,
        input: &MoeInput<'_, Self::A, Self::S>,
        weights: &Self::Moe<'_>,
        output: MoeOutput<'_, Self::A, Self::S>,
    ) -> Result<()>;
    fn wkv(&mut self, input: &WkvInput<'_, Self::A, Self::S>, output: WkvOutput<'_, Self::A, Self::S>) -> Result<()>;
}

/// The reference, f64 throughout, on weights of any type as they lie.
#[derive(Default)]
pub struct Reference;

/// Rows that one thread takes at a time.
const BLOCK: usize = 8;

/// Runs `work` on blocks of rows in parallel: the same numbers as on all of them at once.
pub fn in_blocks<T: Element>(
    x: View<'_, T, 2>,
    mut out: ViewMut<'_, T, 2>,
    work: impl Fn(View<'_, T, 2>, ViewMut<'_, T, 2>) -> Result<()> + Sync,
) -> Result<()> {
    let ([rows, width], [row, col], outs) = (x.shape(), x.strides(), out.shape()[1]);
    if rows <= BLOCK {
        return work(x, out);
    }
    let blocks: Result<Vec<Vec<T>>> = (0..rows.div_ceil(BLOCK))
        .into_par_iter()
        .map(|block| {
            let (start, n) = (block * BLOCK, BLOCK.min(rows - block * BLOCK));
            let x = View::with_strides(&x.data()[start * row..], [n, width], [row, col]);
            let mut y = vec![T::default(); n * outs];
            work(x, ViewMut::new(&mut y, [n, outs]))?;
            Ok(y)
        })
        .collect();
    for (i, y) in blocks?.concat().chunks(outs.max(1)).enumerate() {
        out.row_mut(&[i]).copy_from_slice(y);
    }
    Ok(())
}

/// A matrix `[out, in]` of some element type (more dimensions count as rows).
pub trait Matrix: Sync {
    /// `reference::linear`.
    fn exact(&self, x: View<'_, f64, 2>, bias: Option<&[f64]>, out: ViewMut<'_, f64, 2>) -> Result<()>;
    /// Rows and columns.
    fn size(&self) -> [usize; 2];
    /// One number.
    fn at(&self, row: usize, col: usize) -> f64;
    /// Sequential f32 sum of `x[i] * self[row, i]`; `odd_first`: of each pair of neighbours the second comes first.
    fn dot(&self, x: &[f32], row: usize, odd_first: bool) -> f32;
}

impl<W: Element> Matrix for Array<W> {
    fn exact(&self, x: View<'_, f64, 2>, bias: Option<&[f64]>, out: ViewMut<'_, f64, 2>) -> Result<()> {
        reference::linear(x, self.rows(), bias, out)
    }
    fn size(&self) -> [usize; 2] {
        self.rows().shape()
    }
    fn at(&self, row: usize, col: usize) -> f64 {
        self.rows().at([row, col]).to_f64()
    }
    fn dot(&self, x: &[f32], row: usize, odd_first: bool) -> f32 {
        let row = self.rows().row(&[row]);
        if !odd_first {
            return x.iter().zip(row).fold(0.0, |sum, (x, w)| sum + x * w.to_f32());
        }
        x.chunks(2)
            .zip(row.chunks(2))
            .fold(0.0, |sum, (x, w)| x.iter().zip(w).rev().fold(sum, |sum, (x, w)| sum + x * w.to_f32()))
    }
}

/// A block (or all experts) of some element type.
pub trait Block: Sync {
    fn exact_mlp(&self, spec: &Ffn, x: View<'_, f64, 2>, out: ViewMut<'_, f64, 2>) -> Result<()>;
    /// Gate, up, down.
    fn matrices(&self) -> (Option<&dyn Matrix>, &dyn Matrix, &dyn Matrix);
    /// Gate, up, down.
    fn vectors(&self) -> [Option<&Array<f64>>; 3];
}

impl<W: Element> Block for FfnArrays<W> {
    fn exact_mlp(&self, spec: &Ffn, x: View<'_, f64, 2>, out: ViewMut<'_, f64, 2>) -> Result<()> {
        reference::mlp(spec, x, &self.block(&self.biases::<f64>()), out)
    }
    fn matrices(&self) -> (Option<&dyn Matrix>, &dyn Matrix, &dyn Matrix) {
        (self.gate.as_ref().map(|g| g as &dyn Matrix), &self.up, &self.down)
    }
    fn vectors(&self) -> [Option<&Array<f64>>; 3] {
        [self.gate_bias.as_ref(), self.up_bias.as_ref(), self.down_bias.as_ref()]
    }
}

/// A mixture of some element type.
pub trait Mixture: Sync {
    fn exact_experts(
        &self,
        spec: &ExpertFfn,
        hidden: View<'_, f64, 2>,
        routing: &Routing<'_, f64>,
        out: ViewMut<'_, f64, 2>,
    ) -> Result<()>;
    fn exact_moe(&self, spec: &Moe, input: &MoeInput<'_, f64, f64>, output: MoeOutput<'_, f64, f64>) -> Result<()>;
    fn exact_logits(&self, spec: &Router, hidden: View<'_, f64, 2>, logits: ViewMut<'_, f64, 2>) -> Result<()>;
    fn router(&self) -> (&dyn Matrix, Option<&[f64]>);
    fn experts(&self) -> &dyn Block;
    fn shared(&self) -> Option<(&dyn Block, Option<&dyn Matrix>)>;
}

impl<W: Element> Mixture for MoeArrays<W> {
    fn exact_experts(
        &self,
        spec: &ExpertFfn,
        hidden: View<'_, f64, 2>,
        routing: &Routing<'_, f64>,
        out: ViewMut<'_, f64, 2>,
    ) -> Result<()> {
        reference::expert_ffn(spec, hidden, routing, &self.experts.experts(&self.experts.biases::<f64>()), out)
    }
    fn exact_moe(&self, spec: &Moe, input: &MoeInput<'_, f64, f64>, output: MoeOutput<'_, f64, f64>) -> Result<()> {
        reference::moe(spec, input, &self.weights(&self.vectors::<f64>()), output)
    }
    fn exact_logits(&self, spec: &Router, hidden: View<'_, f64, 2>, logits: ViewMut<'_, f64, 2>) -> Result<()> {
        reference::router_logits(spec, hidden, self.router.view(), self.router_bias.as_deref(), 0, logits)
    }
    fn router(&self) -> (&dyn Matrix, Option<&[f64]>) {
        (&self.router, self.router_bias.as_deref())
    }
    fn experts(&self) -> &dyn Block {
        &self.experts
    }
    fn shared(&self) -> Option<(&dyn Block, Option<&dyn Matrix>)> {
        let gate = self.shared_gate.as_ref().map(|g| g as &dyn Matrix);
        self.shared.as_ref().map(|s| (s as &dyn Block, gate))
    }
}

impl Backend for Reference {
    type A = f64;
    type S = f64;
    type Linear<'a> = &'a dyn Matrix;
    type Mlp<'a> = &'a dyn Block;
    type Moe<'a> = &'a dyn Mixture;
    type Mla<'a> = Array<f64>;

    fn name(&self) -> String {
        "reference".into()
    }

    fn pack_linear<'a, W: Float>(&mut self, weight: &'a Array<W>) -> Result<&'a dyn Matrix> {
        Ok(weight)
    }
    fn pack_mlp<'a, W: Float>(&mut self, _: &Ffn, weights: &'a FfnArrays<W>) -> Result<&'a dyn Block> {
        Ok(weights)
    }
    fn pack_moe<'a, W: Float>(&mut self, _: &Moe, weights: &'a MoeArrays<W>) -> Result<&'a dyn Mixture> {
        Ok(weights)
    }
    fn pack_mla<W: Float>(&mut self, _: &Mla, kv_b: &Array<W>) -> Result<Array<f64>> {
        Ok(kv_b.cast())
    }
    fn norm<const N: usize>(
        &mut self,
        spec: &Norm,
        x: View<'_, f64, N>,
        weight: Option<&[f64]>,
        bias: Option<&[f64]>,
        out: ViewMut<'_, f64, N>,
    ) -> Result<()> {
        reference::norm(spec, x, weight, bias, out)
    }
    fn linear(
        &mut self,
        x: View<'_, f64, 2>,
        weight: &&dyn Matrix,
        bias: Option<&[f64]>,
        out: ViewMut<'_, f64, 2>,
    ) -> Result<()> {
        if x.check("x", x.shape()).is_err() {
            return weight.exact(x, bias, out);
        }
        in_blocks(x, out, |x, out| weight.exact(x, bias, out))
    }
    fn prepare_qkv(
        &mut self,
        spec: &QkvPrep,
        input: &QkvInput<'_, f64, f64>,
        output: QkvOutput<'_, f64>,
    ) -> Result<()> {
        reference::prepare_qkv(spec, input, output)
    }
    fn rope(
        &mut self,
        spec: &Rope,
        x: View<'_, f64, 3>,
        positions: &[u32],
        table: &RopeTable<'_, f64>,
        out: ViewMut<'_, f64, 3>,
    ) -> Result<()> {
        reference::rope(spec, x, positions, table, out)
    }
    fn kv_append(&mut self, input: &KvCache<'_, f64>, cache: KvCacheMut<'_, f64>) -> Result<()> {
        reference::kv_append(input, cache)
    }
    fn attention(
        &mut self,
        spec: &Attention,
        input: &AttentionInput<'_, f64, f64>,
        output: AttentionOutput<'_, f64, f64>,
    ) -> Result<()> {
        reference::attention(spec, input, output)
    }
    fn mla_absorb_query(
        &mut self,
        spec: &Mla,
        q_nope: View<'_, f64, 3>,
        kv_b: &Array<f64>,
        out: ViewMut<'_, f64, 3>,
    ) -> Result<()> {
        reference::mla_absorb_query(spec, q_nope, kv_b.view(), out)
    }
    fn mla_project_value(
        &mut self,
        spec: &Mla,
        latent: View<'_, f64, 3>,
        kv_b: &Array<f64>,
        out: ViewMut<'_, f64, 3>,
    ) -> Result<()> {
        reference::mla_project_value(spec, latent, kv_b.view(), out)
    }
    fn sigmoid_mul(&mut self, x: View<'_, f64, 2>, gate: View<'_, f64, 2>, out: ViewMut<'_, f64, 2>) -> Result<()> {
        reference::sigmoid_mul(x, gate, out)
    }
    fn add(
        &mut self,
        x: View<'_, f64, 2>,
        y: View<'_, f64, 2>,
        multiplier: f64,
        out: ViewMut<'_, f64, 2>,
    ) -> Result<()> {
        reference::add(x, y, multiplier, out)
    }
    fn mlp(&mut self, spec: &Ffn, x: View<'_, f64, 2>, weights: &&dyn Block, out: ViewMut<'_, f64, 2>) -> Result<()> {
        weights.exact_mlp(spec, x, out)
    }
    fn router_logits(
        &mut self,
        spec: &Router,
        hidden: View<'_, f64, 2>,
        weights: &&dyn Mixture,
        logits: ViewMut<'_, f64, 2>,
    ) -> Result<()> {
        weights.exact_logits(spec, hidden, logits)
    }
    fn route(&mut self, spec: &Router, input: &RouteInput<'_, f64>, output: RouteOutput<'_, f64>) -> Result<()> {
        reference::route(spec, input, output)
    }
    fn expert_ffn(
        &mut self,
        spec: &ExpertFfn,
        hidden: View<'_, f64, 2>,
        routing: &Routing<'_, f64>,
        weights: &&dyn Mixture,
        out: ViewMut<'_, f64, 2>,
    ) -> Result<()> {
        weights.exact_experts(spec, hidden, routing, out)
    }
    fn moe(
        &mut self,
        spec: &Moe,
        input: &MoeInput<'_, f64, f64>,
        weights: &&dyn Mixture,
        output: MoeOutput<'_, f64, f64>,
    ) -> Result<()> {
        weights.exact_moe(spec, input, output)
    }
    fn wkv(&mut self, input: &WkvInput<'_, f64, f64>, output: WkvOutput<'_, f64, f64>) -> Result<()> {
        reference::wkv(input, output)
    }
}

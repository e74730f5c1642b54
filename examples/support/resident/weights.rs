//! Weights of a layer in device memory, as checkpoints have them: nothing is packed or transposed.

use super::super::array::{Array, cast};
use super::super::layer::{LayerWeights, NormWeights, Projection};
use super::super::staged::{Staged, StagedFfn, StagedMoe, vector};
use gatefold::cpu::Float;
use gatefold::cuda::driver::Driver;
use gatefold::cuda::{self, DeviceView, DeviceViewMut, Queue, RopeTable};
use gatefold::spec::{AttentionBlock, Layer, Mlp, Norm, Rope};
use gatefold::{Error, Result, View};

pub struct Weights<'d, T> {
    pub attn_norm: NormOnDevice<'d>,
    pub mlp_norm: NormOnDevice<'d>,
    pub post_attn_norm: NormOnDevice<'d>,
    pub post_mlp_norm: NormOnDevice<'d>,
    pub q: Linear<'d, T>,
    /// Latent attention has `latent` in place of these two.
    pub k: Option<Linear<'d, T>>,
    pub v: Option<Linear<'d, T>>,
    pub out: Linear<'d, T>,
    pub q_norm: Vector<'d>,
    pub k_norm: Vector<'d>,
    pub sinks: Vector<'d>,
    pub alibi_slopes: Vector<'d>,
    pub relative_bias: Option<Staged<'d, f32, 2>>,
    pub latent: Option<Latent<'d, T>>,
    pub rope: Option<[Staged<'d, f32, 2>; 2]>,
    pub mlp: Option<StagedFfn<'d, T>>,
    pub moe: Option<StagedMoe<'d, T, T>>,
}

/// Weights of latent attention.
pub struct Latent<'d, T> {
    /// Hidden to the latent of the queries, and its norm.
    pub q_a: Option<(Linear<'d, T>, Staged<'d, f32, 1>)>,
    /// Hidden to `[latent | k_rope]`.
    pub kv_a: Linear<'d, T>,
    pub kv_a_norm: Staged<'d, f32, 1>,
    /// `[num_heads, nope_dim + value_dim, kv_lora_rank]`
    pub kv_b: Staged<'d, T, 3>,
}

/// f32 numbers, where the layer has them.
pub type Vector<'d> = Option<Staged<'d, f32, 1>>;

fn numbers<'d>(driver: &'d dyn Driver, data: &Option<Vec<f64>>) -> Result<Vector<'d>> {
    data.as_ref().map(|data| vector(driver, &cast::<f64, f32>(data))).transpose()
}

pub fn as_view<'a>(vector: &'a Vector<'_>) -> Option<DeviceView<'a, f32, 1>> {
    vector.as_ref().map(Staged::view)
}

/// Weight and bias of a norm.
pub struct NormOnDevice<'d> {
    pub weight: Vector<'d>,
    pub bias: Vector<'d>,
}

impl<'d> NormOnDevice<'d> {
    fn new(driver: &'d dyn Driver, norm: &NormWeights) -> Result<Self> {
        Ok(NormOnDevice { weight: numbers(driver, &norm.weight)?, bias: numbers(driver, &norm.bias)? })
    }

    pub fn run<T: Float>(
        &self,
        queue: &mut Queue<'_>,
        spec: &Norm,
        x: DeviceView<'_, T, 2>,
        out: DeviceViewMut<'_, T, 2>,
    ) -> Result<()> {
        cuda::norm(queue, spec, x, as_view(&self.weight), as_view(&self.bias), out)
    }
}

/// One projection.
pub struct Linear<'d, T> {
    weight: Staged<'d, T, 2>,
    bias: Vector<'d>,
}

impl<'d, T: Float> Linear<'d, T> {
    fn new(driver: &'d dyn Driver, projection: &Projection<T>) -> Result<Self> {
        let weight = Staged::new(driver, projection.weight.rows())?;
        Ok(Linear { weight, bias: numbers(driver, &projection.bias)? })
    }

    /// Rows and columns.
    pub fn shape(&self) -> [usize; 2] {
        self.weight.view().shape()
    }

    pub fn run(&self, queue: &mut Queue<'_>, x: DeviceView<'_, T, 2>, out: DeviceViewMut<'_, T, 2>) -> Result<()> {
        cuda::linear(queue, x, self.weight.view(), as_view(&self.bias), out)
    }
}

impl<'d, T: Float> Weights<'d, T> {
    /// Copies them to the device, with cos and sin of so many positions.
    pub fn new(driver: &'d dyn Driver, spec: &Layer, weights: &LayerWeights<T>, positions: usize) -> Result<Self> {
        let a = &weights.attention;
        let (rope, latent) = match &spec.attention {
            AttentionBlock::Mla(block) => {
                let q_a = match (&a.q_a, &a.q_a_norm) {
                    (Some(q_a), Some(norm)) => {
                        Some((Linear::new(driver, q_a)?, vector(driver, &cast::<f64, f32>(norm))?))
                    }
                    _ => None,
                };
                let kv_a = Linear::new(driver, given("kv_a", &a.kv_a)?)?;
                let kv_a_norm = vector(driver, &cast::<f64, f32>(given("kv_a_norm", &a.kv_a_norm)?))?;
                let kv_b = Staged::new(driver, given("kv_b", &a.kv_b)?.view())?;
                (Some(&block.rope), Some(Latent { q_a, kv_a, kv_a_norm, kv_b }))
            }
            AttentionBlock::Gqa(block) => (block.rope.as_ref(), None),
            _ => return Err(super::unsupported("attention block")),
        };
        let (mut mlp, mut moe) = (None, None);
        match &spec.mlp {
            Mlp::Dense(_) => {
                let host = given("mlp", &weights.mlp)?;
                mlp = Some(StagedFfn::new(driver, &host.block(&host.biases::<f32>()))?);
            }
            Mlp::Moe(_) => {
                let host = given("moe", &weights.moe)?;
                moe = Some(StagedMoe::new(driver, &host.weights(&host.vectors::<f32>()))?);
            }
            _ => return Err(super::unsupported("feed-forward part")),
        }
        let separate = |projection| latent.is_none().then(|| Linear::new(driver, projection)).transpose();
        let table: Option<Array<f32>> = a.relative_bias.as_ref().map(Array::cast);
        Ok(Weights {
            attn_norm: NormOnDevice::new(driver, &weights.attn_norm)?,
            mlp_norm: NormOnDevice::new(driver, &weights.mlp_norm)?,
            post_attn_norm: NormOnDevice::new(driver, &weights.post_attn_norm)?,
            post_mlp_norm: NormOnDevice::new(driver, &weights.post_mlp_norm)?,
            q: Linear::new(driver, &a.q)?,
            k: separate(&a.k)?,
            v: separate(&a.v)?,
            out: Linear::new(driver, &a.out)?,
            q_norm: numbers(driver, &a.q_norm)?,
            k_norm: numbers(driver, &a.k_norm)?,
            sinks: numbers(driver, &a.sinks)?,
            alibi_slopes: numbers(driver, &a.alibi_slopes)?,
            relative_bias: table.map(|table| Staged::new(driver, table.view())).transpose()?,
            latent,
            rope: rope.map(|rope| tables(driver, rope, positions)).transpose()?,
            mlp,
            moe,
        })
    }

    pub fn rope_table(&self) -> Option<RopeTable<'_>> {
        self.rope.as_ref().map(|[cos, sin]| RopeTable::new(cos.view(), sin.view()))
    }

    /// Columns of all projections from the hidden state together.
    pub fn projected_width(&self) -> usize {
        let rows = |linear: &Linear<'d, T>| linear.shape()[0];
        match &self.latent {
            Some(latent) => latent.q_a.as_ref().map_or(rows(&self.q), |(q_a, _)| rows(q_a)) + rows(&latent.kv_a),
            None => rows(&self.q) + [&self.k, &self.v].into_iter().flatten().map(rows).sum::<usize>(),
        }
    }
}

fn tables<'d>(driver: &'d dyn Driver, rope: &Rope, positions: usize) -> Result<[Staged<'d, f32, 2>; 2]> {
    let (cos, sin) = rope.table(positions);
    let shape = [positions, rope.rotary_dim / 2];
    let table = |data: &[f64]| Staged::new(driver, View::new(&cast::<f64, f32>(data), shape));
    Ok([table(&cos)?, table(&sin)?])
}

fn given<'a, W>(name: &str, weights: &'a Option<W>) -> Result<&'a W> {
    weights.as_ref().ok_or_else(|| Error::Presence {
        argument: name.into(),
        expected: "given: the layer has it".into(),
        found: "absent".into(),
    })
}

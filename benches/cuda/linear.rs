//! `linear`: dense products, as projections are.

use crate::case::{Case, Job, Twin, compare, random, samples};
use crate::support::array::Array;
use crate::support::folder::Folder;
use gatefold::cuda::{Device, Queue, linear};
use gatefold::{Element, Result, reference};
use half::bf16;

/// Tokens, outputs, inputs.
const SHAPES: [[usize; 3]; 6] =
    [[1, 4096, 4096], [64, 4096, 4096], [512, 4096, 4096], [4096, 4096, 4096], [4096, 14336, 4096], [8192, 8192, 8192]];

pub fn cases(cases: &mut Vec<Case>) {
    SHAPES.iter().for_each(|shape| cases.push(case::<bf16>(*shape)));
    cases.push(case::<f32>([4096, 4096, 4096]));
}

fn case<T: Element>([tokens, outputs, inputs]: [usize; 3]) -> Case {
    Case {
        name: format!("linear/{tokens}x{outputs}x{inputs}/{}", T::DTYPE),
        kind: "linear",
        dtype: T::DTYPE,
        flops: 2.0 * (tokens * outputs * inputs) as f64,
        make: Box::new(move |device| Ok(Box::new(Product::<T>::new(device, [tokens, outputs, inputs])?))),
    }
}

struct Product<T> {
    queue: Queue<'static>,
    shape: [usize; 3],
    x: Twin<T>,
    weight: Twin<T>,
    out: Twin<T>,
}

impl<T: Element> Product<T> {
    fn new(device: &'static Device, shape: [usize; 3]) -> Result<Self> {
        let [tokens, outputs, inputs] = shape;
        Ok(Product {
            queue: Queue::new(device),
            shape,
            x: Twin::new(device, random(1, &[tokens, inputs], 1.0))?,
            weight: Twin::new(device, random(2, &[outputs, inputs], (inputs as f64).sqrt().recip()))?,
            out: Twin::zeros(device, &[tokens, outputs])?,
        })
    }
}

impl<T: Element> Job for Product<T> {
    fn call(&mut self) -> Result<()> {
        let [tokens, outputs, inputs] = self.shape;
        let (x, weight) = (self.x.view([tokens, inputs]), self.weight.view([outputs, inputs]));
        linear(&mut self.queue, x, weight, None, self.out.view_mut([tokens, outputs]))
    }

    fn check(&mut self) -> std::result::Result<(), String> {
        self.call().and_then(|()| self.out.fetch().map(|_| ())).map_err(|e| e.to_string())?;
        let rows = samples(self.shape[0]);
        let mut truth = Array::<f64>::zeros(&[rows.len(), self.shape[1]]);
        let x = self.x.host.pick(&rows);
        reference::linear::<_, _, f32>(x.view(), self.weight.host.view(), None, truth.view_mut())
            .map_err(|e| e.to_string())?;
        compare(&self.out.host, &rows, &truth)
    }

    fn write(&mut self, folder: &mut Folder) -> std::io::Result<()> {
        [("x", &self.x), ("weight", &self.weight), ("out", &self.out)]
            .into_iter()
            .try_for_each(|(name, twin)| folder.array(name, &twin.host))
    }

    fn bytes(&self) -> f64 {
        let [tokens, outputs, inputs] = self.shape;
        ((tokens * inputs + outputs * inputs + tokens * outputs) * size_of::<T>()) as f64
    }
}

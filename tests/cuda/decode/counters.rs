//! Instructions, sectors and conflicts of decode and merge.

use super::*;

/// Widths between the kernels' own: keys and values are read at their width, none of the padding. Sectors, and instructions for a KiB of keys
/// and values. 1024 keys of one key/value head, 8 heads.
#[test]
fn decode_counters_between_widths() {
    let mut counted = Vec::new();
    for (dims, layout) in [
        ((64, 64), Layout::Contiguous),
        ((80, 80), Layout::Contiguous),
        ((96, 96), Layout::Contiguous),
        ((128, 128), Layout::Contiguous),
        ((192, 128), Layout::Contiguous),
        ((192, 192), Layout::Contiguous),
        ((256, 256), Layout::Contiguous),
        ((64, 64), Layout::Padded),
        ((80, 80), Layout::Padded),
        ((256, 256), Layout::Padded),
    ] {
        let simulator = Simulator::new(false);
        let options = AttentionOptions::new((8, 1), 0, &[(1, 1024)]);
        let case = AttentionCase::<bf16>::new(&with!(options, dims: dims, layout: layout), 1);
        let _: AttentionResult<bf16, f32> =
            case.run(|spec, input, output| staged::attention(&simulator, spec, input, output));
        let (entry, counters) = simulator.take_counters()[0];
        let (kv_bytes, sectors) = (1024 * 2 * (dims.0 + dims.1) as u64, counters.global_sectors);
        if layout == Layout::Contiguous {
            // Beside them: queries once a split, parts in f32, and what tells where all that lies.
            let others = 4 * (8 * (dims.0 / 16 + dims.1 / 8) + 2 * 16 + 8) as u64;
            let kv = kv_bytes / 32;
            assert!((kv..=kv + others).contains(&sectors), "{entry}: {sectors} sectors of {kv} + {others}");
        }
        let instructions = 1024 * counters.instructions / kv_bytes;
        println!("{entry}, {dims:?} {layout:?}: {sectors} sectors, {instructions} instructions a KiB");
        counted.push((dims, layout, sectors, instructions));
    }
    let expected = [
        ((64, 64), Layout::Contiguous, 8648, 133),
        ((80, 80), Layout::Contiguous, 10792, 134),
        ((96, 96), Layout::Contiguous, 12936, 112),
        ((128, 128), Layout::Contiguous, 17224, 84),
        ((192, 128), Layout::Contiguous, 21448, 69),
        ((192, 192), Layout::Contiguous, 25800, 67),
        ((256, 256), Layout::Contiguous, 34376, 50),
        // Copied element by element: a sector counts for each request that touches it.
        ((64, 64), Layout::Padded, 75148, 231),
        ((80, 80), Layout::Padded, 100_200, 447),
        ((256, 256), Layout::Padded, 300_552, 139),
    ];
    assert_eq!(counted, expected);
}

/// What speed depends on, in counts: no bank conflict, whole sectors, keys and values read once. 1024 keys of one key/value head.
#[test]
fn decode_counters() {
    let counters = |heads: usize, dims: (usize, usize), values: Values, kv: KvLayout| {
        let simulator = Simulator::new(false);
        let mut options = AttentionOptions::new((heads, 1), 0, &[(1, 1024)]);
        (options.dims, options.kv) = (dims, kv);
        let case = AttentionCase::<bf16>::new(&options, 1);
        let _: AttentionResult<bf16, f32> =
            run(&case, values, |spec, input, output| staged::attention(&simulator, spec, input, output));
        let counters = simulator.take_counters();
        assert_eq!(counters.len(), 2, "one kernel for the parts, one for the merge");
        for (entry, counters) in &counters {
            assert_eq!(counters.conflict_degree(), 1.0, "{entry}");
        }
        counters[0]
    };
    let (mut counted, mut expected) = (Vec::new(), Vec::new());
    // Warp instructions, wavefronts of shared memory, sectors of global memory, all in the kernel of the parts.
    for (heads, dims, values, entry, recorded) in [
        (8, (64, 64), Values::Own, "gatefold_attention_decode_bf16_64_64", [34224, 8560, 8648]),
        (8, (128, 128), Values::Own, "gatefold_attention_decode_bf16_128_128", [43184, 13232, 17224]),
        (8, (192, 128), Values::Own, "gatefold_attention_decode_bf16_192_128", [44608, 15600, 21448]),
        (8, (256, 256), Values::Own, "gatefold_attention_decode_bf16_256_256", [51712, 22576, 34376]),
        (16, (576, 512), Values::OfKeys, "gatefold_attention_decode_bf16_576_512_shared_16", [63440, 49848, 40104]),
        (64, (576, 512), Values::OfKeys, "gatefold_attention_decode_bf16_576_512_shared_64", [180558, 165728, 49760]),
    ] {
        let (name, c) = counters(heads, dims, values, KvLayout::Ragged);
        assert_eq!(name, entry);
        counted.push((entry, [c.instructions, c.shared_wavefronts, c.global_sectors]));
        expected.push((entry, recorded));
        // Keys and values once, and little else: queries, parts, and what tells where all that lies.
        let kv_sectors = 1024 * (dims.0 + if values == Values::Own { dims.1 } else { 0 }) / 16;
        let (splits, rows) = (if dims.0 > 256 { 2 } else { 4 }, heads.next_multiple_of(16));
        let others = splits * (heads * (dims.0 / 16 + dims.1 / 8) + 2 * rows + 8);
        let sectors = c.global_sectors as usize;
        assert!((kv_sectors..=kv_sectors + others).contains(&sectors), "{entry}: {sectors} of {kv_sectors} + {others}");
        // 16 rows an MMA, of which `heads` are there.
        assert_eq!(c.mma_flops as usize, 1024 * 2 * rows * (dims.0 + dims.1), "{entry}");
        let [row_warps, col_warps, keys, of_scores, of_values, ..] = budget(entry)[..] else {
            panic!("{entry}: its header")
        };
        assert_eq!(c.class(Class::Matrix), 1024 / keys * row_warps * col_warps * (of_scores + of_values), "{entry}");
        let (_, paged) = counters(heads, dims, values, KvLayout::Paged(16));
        assert!(paged.global_sectors <= c.global_sectors + 16 * splits as u64, "{entry}: a block table is read once");
    }
    assert_eq!(counted, expected);
}

/// 128 more keys of a split in f32: no bank conflict, keys and values once in whole sectors, the multiply-adds of the header.
#[test]
fn decode_counters_f32() {
    let (mut found, mut expected) = (Vec::new(), Vec::new());
    for (dims, recorded) in
        [((64, 64), 45_204), ((128, 128), 54_932), ((192, 128), 62_612), ((256, 256), 74_388), ((576, 512), 120_980)]
    {
        let counted = |kv_len: usize| {
            let simulator = Simulator::new(false);
            let mut options = AttentionOptions::new((8, 1), 0, &[(1, kv_len)]);
            options.dims = dims;
            let case = AttentionCase::<f32>::new(&options, 1);
            let _: AttentionResult<f32, f32> =
                run(&case, Values::Own, |spec, input, output| staged::attention(&simulator, spec, input, output));
            let [(entry, counters)] = simulator.take_counters()[..] else { panic!("one launch") };
            (entry, counters)
        };
        let ((entry, few), (_, many)) = (counted(128), counted(256));
        assert_eq!(entry, "gatefold_attention_decode_f32_f32");
        assert_eq!(many.conflict_degree(), 1.0, "{dims:?}");
        let bytes = (128 * (dims.0 + dims.1) * 4) as u64;
        assert_eq!(many.global_bytes - few.global_bytes, bytes, "{dims:?}: keys and values, each once");
        assert_eq!(many.global_sectors - few.global_sectors, bytes / 32, "{dims:?}: in whole sectors");
        // Besides the products: a factor for each sum, and the softmax, which is the same for all widths.
        let [fma, keys, sums, ..] = budget(entry)[..] else { panic!("{entry}: what its header has") };
        let warps = 128 / keys * 4;
        let floats = many.class(Class::Float) - few.class(Class::Float);
        found.push((dims, many.instructions - few.instructions, floats - warps * (dims.0 as u64 + fma + sums)));
        expected.push((dims, recorded, warps * 44));
    }
    assert_eq!(found, expected, "instructions, those of the softmax");
}

/// 32 more parts of 2 heads, 128 columns each: no bank conflict, the parts once in whole sectors, and what tells their weights.
#[test]
fn merge_counters() {
    fn count<T: Element, O: Element>() -> (&'static str, u64, u64) {
        let counted = |parts: usize| {
            let simulator = Simulator::new(false);
            let shape = [parts, 1, 2, 128];
            let outs = Array::<T, 4>::new(shape, Layout::Contiguous, &vec![T::from_f32(1.0); parts * 256]);
            let lses = Array::<f32, 3>::new([parts, 1, 2], Layout::Contiguous, &vec![0.0; parts * 2]);
            let mut out = Output::<O, 3>::new([1, 2, 128], Layout::Contiguous);
            staged::merge(&simulator, outs.view(), lses.view(), AttentionOutput::new(out.view())).unwrap();
            let [(entry, counters)] = simulator.take_counters()[..] else { panic!("one launch") };
            assert_eq!(counters.conflict_degree(), 1.0, "{entry}");
            (entry, counters)
        };
        let ((entry, few), (_, many)) = (counted(32), counted(64));
        let parts = (32 * 2 * 128 * size_of::<T>() / 32) as u64;
        (entry, many.instructions - few.instructions, many.global_sectors - few.global_sectors - parts)
    }
    let found = [count::<f32, f32>(), count::<f32, bf16>(), count::<bf16, bf16>(), count::<f16, f32>()];
    // A lane each for the largest, every second element of 8 sectors; then one by one with the part.
    let lses = 2 * (8 + 32);
    let expected = [
        ("gatefold_attention_merge_f32_f32", 3772, lses),
        ("gatefold_attention_merge_f32_bf16", 3772, lses),
        ("gatefold_attention_merge_bf16_bf16", 4796, lses),
        ("gatefold_attention_merge_f16_f32", 4284, lses),
    ];
    assert_eq!(found, expected, "instructions, sectors besides those of the parts");
}

//! The `Budget` line of the headers: tests of counters hold its numbers to what the simulator counts, the one here to what the text declares.

use gatefold::cuda::kernels;

/// The line of this kernel, without the lines that continue it.
fn line(ptx: &'static str) -> Option<&'static str> {
    ptx.lines().find_map(|line| line.strip_prefix("//   Budget "))
}

/// The numbers of the line, in order.
#[track_caller]
pub fn budget(entry: &str) -> Vec<u64> {
    let kernel = kernels::ALL.iter().find(|kernel| kernel.entry == entry).unwrap();
    let line = line(kernel.ptx).unwrap_or_else(|| panic!("{entry} has no budget"));
    line.split_whitespace().filter_map(|word| word.trim_end_matches([',', ';']).parse().ok()).collect()
}

/// Shared bytes are those that the text declares, unless the launch gives them all.
#[test]
fn shared_bytes() {
    let mut checked = 0;
    for kernel in kernels::ALL {
        let Some((before, after)) = line(kernel.ptx).and_then(|line| line.split_once(" shared bytes")) else {
            continue;
        };
        if kernel.dynamic_shared && !after.starts_with(" besides the dynamic ones") {
            continue;
        }
        let expected = match before.rsplit(' ').next().unwrap() {
            "no" => 0,
            number => number.parse().unwrap(),
        };
        assert_eq!(kernel.static_shared_bytes, expected, "{}", kernel.entry);
        checked += 1;
    }
    assert!(checked > 50, "{checked} kernels");
}
